"""What users of the library pass in, as items."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from cocoa_pl.data.images import Picture, as_source, embedded
from cocoa_pl.data.items import IMAGE_SLOT, TEMPLATE, Item, placed
from cocoa_pl.errors import UserError

Input = str | Picture | Item | Mapping[str, Any]


def as_list(items: Iterable[Input]) -> Sequence[Input]:
    """Items in their own order, to be asked for by place.

    A `Sequence` or a data set of `datasets` stays what it is, and is read when it is its turn. What
    else has an order becomes a list: a pandas or polars Series, whose labels are no places, an
    array of strings or of pictures, a generator.

    Raises:
        UserError: for a single item, and for what has no order or no items.
    """
    if isinstance(items, _SINGLE):
        raise UserError(f"items come in a list; write [item] for a single {type(items).__name__}")
    if isinstance(items, set | frozenset):
        raise UserError("a set has no order; write sorted(items)")
    if any(base.__name__ == "DataFrame" for base in type(items).__mro__):
        raise UserError("a table is no list; take a column, or rows: table.to_dict('records')")
    if isinstance(items, Tensor):
        raise UserError("a tensor is no list of items; write tensor.numpy() for uint8 pictures")
    if isinstance(items, np.ndarray) and items.ndim not in (1, 4):
        raise UserError(
            f"an array of shape {items.shape} is taken for one picture; write [array], or "
            "list(array) for several without colours"
        )
    datasets = sys.modules.get("datasets")  # imported, if there is a data set of it
    if isinstance(items, Sequence) or (datasets and isinstance(items, datasets.Dataset)):
        return items
    if not isinstance(items, Iterable):
        raise UserError(f"items come in a list, not in {type(items).__name__}; write [item]")
    return list(items)


_SINGLE = (str, bytes, bytearray, memoryview, os.PathLike, Image, Item, Mapping, io.IOBase)


def as_item(value: Input, instruction: str | None = None) -> Item:
    """What users pass to an `Item`.

    Args:
        instruction: what the item is embedded for; it comes before the item's own words and behind
            images that stand before them, as in MMEB's queries. None or empty for nothing.

    Raises:
        UserError: for an empty or unknown input, or placeholders that do not fit the images.
    """
    if not isinstance(instruction, str | None):
        raise UserError(
            f"an instruction is one string for all items, not {type(instruction).__name__}; "
            "encode those of each instruction in a call of their own"
        )
    item = _item(value)
    return Item(instructed(item.text, instruction), item.media) if instruction else item


def instructed(text: str, instruction: str) -> str:
    """A text with slots, and an instruction before its words.

    Raises:
        UserError: for an instruction with a placeholder.
    """
    words = text.lstrip(IMAGE_SLOT)
    first = text[: len(text) - len(words)]
    if first and words.startswith("\n"):
        first, words = f"{first}\n", words[1:]
    # What comes before the words does not depend on them: once a call, not once an item.
    return _before_words(first, instruction, has_words=bool(words)) + words


@lru_cache(maxsize=256)
def _before_words(first: str, instruction: str, *, has_words: bool) -> str:
    words = "x" * has_words
    found: str = TEMPLATE.instructed(first + words, instruction)
    return found.removesuffix(words)


def _item(value: Input) -> Item:
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        value = {"text": value}
    elif (
        isinstance(value, bytes | os.PathLike | Image | np.ndarray) or embedded(value) is not value
    ):
        value = {"image": value}
    if not isinstance(value, Mapping):
        raise UserError(
            "an item is a string, an image (a path, bytes, a PIL image or an array), a dict or an "
            f"Item, not {type(value).__name__}; {_instead(value)}"
        )
    if unknown := set(value) - {"text", "image"}:
        raise UserError(
            f"an item has the keys text and image, not {sorted(map(str, unknown))}; rename or drop "
            "the others"
        )
    text = value.get("text")
    text = "" if _is_missing(text) else text
    if not isinstance(text, str):
        raise UserError(f"an item's text is a string, not {type(text).__name__}; {_instead(text)}")
    images = tuple(map(as_source, _pictures(value.get("image"))))
    if not text and not images:
        raise UserError("an item needs a text or an image; this one is empty")
    return Item(placed(str(text), len(images)), images)


def _instead(value: object) -> str:
    """What to write instead of something that is no item."""
    if _is_missing(value):
        return "leave it out"
    if isinstance(value, bytes | bytearray):
        return "write text.decode()"
    if isinstance(value, Tensor):
        return "write tensor.numpy(), uint8 of height x width x 3"
    if isinstance(value, io.IOBase):
        return "write file.read()"
    if isinstance(value, Iterable):
        return 'one item with several parts is {"text": ..., "image": [...]}'
    return "write str(item) for a text"


def _pictures(image: Any) -> list[Any]:
    """One picture, several, or none."""
    image = embedded(image)
    if _is_missing(image):
        return []
    if isinstance(image, Iterator):  # an item is looked at twice: for its cost, and to be read
        raise UserError(
            f"an item's images come in a list, not in a {type(image).__name__}; write list(images)"
        )
    is_array = isinstance(image, np.ndarray) and image.dtype.kind not in "OU" and image.ndim != 4
    if is_array or isinstance(image, _SINGLE) or not isinstance(image, Iterable):
        return [image]
    return [one for one in map(embedded, as_list(image)) if not _is_missing(one)]


def _is_missing(value: object) -> bool:
    """None, and what pandas writes for it."""
    pandas = sys.modules.get("pandas")
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (pandas is not None and value is pandas.NA)
