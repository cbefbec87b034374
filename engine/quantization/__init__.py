"""Frozen linear layers kept in 8 or 4 bits, and base models packed into them layer by layer."""
