"""What is known about a start that ended without a word: killed, out of memory, power cut. Torch-free."""
