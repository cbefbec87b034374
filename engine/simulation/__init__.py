"""The memory of one real step, counted on the meta device: no weights, no card."""
