"""All pictures of a dataset on one sheet."""
