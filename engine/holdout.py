"""Which pictures are held out of the training to validate on. Torch-free."""
