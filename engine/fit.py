"""The fit solver: the fastest way to train a base model on a card, and what each step of it costs. Torch-free."""
