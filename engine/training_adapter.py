"""A frozen LoRA that is active while training only, so that a distilled base model can be trained."""
