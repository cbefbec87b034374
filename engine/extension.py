"""A run that goes on with another plan: more steps or another rate, from the newest checkpoint."""
