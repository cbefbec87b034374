"""Reading a LoRA of any layout back into weight changes by component and layer."""
