"""Which files of a dataset are pictures, captions and masks, in every layout that people have."""
