"""Training pairs and a model in, the same pairs with hard negatives out."""
