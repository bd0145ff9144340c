"""Dataset rows to packed batches; imports no model."""
