"""Whether an error means that memory ran out, on a card or on the machine. Torch-free."""
