"""ZIP archives as datasets, unpacked with limits into the cache."""
