"""Datasets described by a Kohya TOML file."""
