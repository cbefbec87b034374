"""What can be done with a run that nobody works on: find, rename, delete."""
