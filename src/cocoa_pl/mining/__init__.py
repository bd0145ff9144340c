"""Hard negatives for training pairs, found by a model."""
