"""The steps of the five scripts, stage by stage."""
