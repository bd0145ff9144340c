"""Backbones, heads and adapters around stock transformers models."""
