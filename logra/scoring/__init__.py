"""Stages 3 and 4: score train examples, combine the scores of checkpoints, rank examples."""
