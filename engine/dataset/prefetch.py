"""Batches prepared ahead by threads."""
