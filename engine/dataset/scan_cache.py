"""What earlier scans found out, kept by content."""
