"""Stages 1 and 2: generate responses, open runs, extract gradients."""
