"""Stage 4: rank, select, and show scores."""
