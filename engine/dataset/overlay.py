"""Edited captions and left-out pictures, beside the dataset and not in it."""
