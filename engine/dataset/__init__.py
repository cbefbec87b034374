"""The dataset: finding pictures and captions, sorting them into sizes, caching and batching them."""
