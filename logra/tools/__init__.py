"""Tools that inspect a run: before it (estimate, verify) and after it (diagnose, tokens, report)."""
