"""What can be wrong with captions."""
