"""Settings that are known to spoil a LoRA, each with its fix. Torch-free."""
