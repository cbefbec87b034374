"""Several runs one after another, or one a GPU, surviving a restart."""
