"""The trigger word as the tokenizers of a base model read it."""
