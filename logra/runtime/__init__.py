"""How a stage runs: settings and flags, processes, progress, files that are written whole."""
