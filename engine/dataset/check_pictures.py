"""What can be wrong with pictures."""
