"""From what a person types to records: configuration, identity, plan, cost, launching, sweeps."""
