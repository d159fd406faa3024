"""What looks at a run: estimates, checks, diagnosis, token shares, the report."""
