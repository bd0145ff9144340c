"""What users of the library pass in, `Item`s out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Image

from cocoa_pl.items import IMAGE_SLOT, ImageSource, Item

Input = str | Item | Mapping[str, Any]


def as_item(value: Input) -> Item:
    """What users pass to an `Item`.

    Raises:
        ValueError: for an empty or unknown input.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"an item is a string, an Item or a dict, not {type(value).__name__}")
    if unknown := set(value) - {"text", "image"}:
        raise ValueError(f"an item has the keys text and image, not {sorted(unknown)}")
    text, image = value.get("text") or "", value.get("image")
    if not isinstance(text, str):
        raise ValueError(f"an item's text is a string, not {type(text).__name__}")
    sources: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    images: tuple[ImageSource, ...] = tuple(
        Path(s) if isinstance(s, str) else s for s in sources if s is not None
    )
    if not text and not images:
        raise ValueError("an item needs a text or an image")
    if not all(isinstance(s, Path | bytes | Image) for s in images):
        raise ValueError("an image is a path, bytes or a PIL image")
    missing = len(images) - text.count(IMAGE_SLOT)
    return Item(IMAGE_SLOT * max(missing, 0) + text, images)
