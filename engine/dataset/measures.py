"""Measures of a picture: hash, sharpness, light, borders."""
