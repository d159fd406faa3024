"""How a stage runs: settings and flags, processes, memory, progress, and atomic files."""
