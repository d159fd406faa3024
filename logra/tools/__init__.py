"""Tools for the time before a run: what it needs (estimate, trial), and whether it will be right (verify)."""
