"""The user's own command at the end of a run."""
