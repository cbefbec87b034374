"""Edits of many captions at once, and writing them to the user's own files."""
