"""A running average of the adapter's weights."""
