"""A base model family that is no part of the package: `test_outside_family` adds it from here and trains it."""
