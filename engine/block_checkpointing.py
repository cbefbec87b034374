"""Gradient checkpointing of a chosen share of the blocks, with what it keeps on the card or in main memory."""
