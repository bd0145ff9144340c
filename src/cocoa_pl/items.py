"""Moved to `cocoa_pl.data.items`; this name goes when its last callers have."""

from cocoa_pl.data.images import ImageSource
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair, as_key, numbered

__all__ = ["IMAGE_SLOT", "ImageSource", "Item", "Pair", "as_key", "numbered"]
