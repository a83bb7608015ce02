"""Training loops over one engine, and the planning and launching of runs."""
