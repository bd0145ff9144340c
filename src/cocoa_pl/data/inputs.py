"""What users of the library pass in, `Item`s out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, fromarray

from cocoa_pl.items import IMAGE_SLOT, ImageSource, Item, images_first

Picture = Path | bytes | Image | NDArray[np.uint8]
Input = str | Picture | Item | Mapping[str, Any]


def as_item(value: Input, instruction: str | None = None) -> Item:
    """What users pass to an `Item`.

    Args:
        instruction: what the item is embedded for; it comes before the item's own words and behind
            images that stand before them, as in MMEB's queries.

    Raises:
        ValueError: for an empty or unknown input.
    """
    item = _item(value)
    return item if instruction is None else _instructed(item, instruction)


def _item(value: Input) -> Item:
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        value = {"text": value}
    elif isinstance(value, Path | bytes | Image | np.ndarray):
        value = {"image": value}
    if not isinstance(value, Mapping):
        raise ValueError(
            "an item is a string, an image (a path, bytes, a PIL image or an array), a dict or an "
            f"Item, not {type(value).__name__}"
        )
    if unknown := set(value) - {"text", "image"}:
        raise ValueError(f"an item has the keys text and image, not {sorted(unknown)}")
    text, image = value.get("text"), value.get("image")
    if not isinstance(text, str | None):
        raise ValueError(f"an item's text is a string, not {type(text).__name__}")
    text = text or ""
    sources = image if isinstance(image, list | tuple) else [image]
    images = tuple(_source(source) for source in sources if source is not None)
    if not text and not images:
        raise ValueError("an item needs a text or an image")
    missing = len(images) - text.count(IMAGE_SLOT)
    return Item(images_first(text, max(missing, 0)), images)


def _source(image: object) -> ImageSource:
    if isinstance(image, str):
        return Path(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ValueError(
                "an image's array is uint8 of height x width x 3, or height x width, not "
                f"{image.dtype} of {' x '.join(map(str, image.shape))}"
            )
        return fromarray(image)
    if isinstance(image, Path | bytes | Image):
        return image
    raise ValueError(
        f"an image is a path, bytes, a PIL image or an array, not {type(image).__name__}"
    )


def _instructed(item: Item, instruction: str) -> Item:
    words = item.text.lstrip(f"{IMAGE_SLOT}\n ")
    slots = item.text[: len(item.text) - len(words)].count(IMAGE_SLOT)
    between = "" if instruction[-1:].isspace() else " "
    return Item(images_first(f"{instruction}{between}{words}".rstrip(), slots), item.images)
