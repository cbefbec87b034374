"""The loss on held-out pictures with the same noise each time, by noise level."""
