"""From records to tables, figures, the page, dashboards and releases; runs nothing."""
