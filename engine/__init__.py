"""The engine: everything of a training run but the screen."""
