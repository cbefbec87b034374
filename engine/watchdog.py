"""Notices that the engine shows no sign of life any more, and writes down where it is."""
