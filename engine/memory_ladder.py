"""What to do less of when memory runs out: one rung at a time, with the same effective batch."""
