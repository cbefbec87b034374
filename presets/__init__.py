"""Advice as data: one TOML file a base model family, and the embedded demo."""
