"""What the five scripts call, stage by stage."""
