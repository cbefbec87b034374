"""What a run costs: hours, energy, and money at dated prices. Torch-free."""
