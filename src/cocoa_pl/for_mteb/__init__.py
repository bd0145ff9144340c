"""A model in, scores of mteb's tasks out; needs the extra `mteb`."""
