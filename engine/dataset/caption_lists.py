"""Captions of many pictures in one file: metadata.jsonl and CSV."""
