"""Everything that a check of a dataset finds, in the order of its weight."""
