"""Several processes: exact sums and gathers, and how a model lies on them."""
