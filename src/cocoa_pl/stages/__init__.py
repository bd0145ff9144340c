"""LightningModules of the stages, and the recipe that chains them."""
