"""What one picture file tells, worked out in a child process."""
