"""Stage 3, and what stage 4 shares with it: score train examples, combine checkpoints, rank examples."""
