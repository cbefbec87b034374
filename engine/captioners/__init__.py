"""Captioners: the narrow protocol, and how captioners are found."""
