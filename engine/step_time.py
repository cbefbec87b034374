"""How long a step takes on a card, from its data sheet or from what was measured on it. Torch-free."""
