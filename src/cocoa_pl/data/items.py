"""Items, pairs and evaluation subsets: what rows of data, and what users pass in, become.

Media stay what the data gave (a path, bytes, an opened picture) until a worker opens them.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL.ExifTags import Base
from PIL.Image import Image

from cocoa_pl.data.images import ImageSource, Picture, as_source, embedded
from cocoa_pl.errors import UserError

# A noncharacter: Unicode keeps it for inside use, so no text that people exchange holds it. Readers
# translate placeholders (MMEB: <|image_1|>) to it once; a model's own image token never occurs in
# an Item's text.
IMAGE_SLOT = "\ufdd0"

Medium = ImageSource  # another kind of medium is added here, and where rows make media


GROUPS = ("classification", "vqa", "retrieval", "grounding")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to embed: a text in which each `IMAGE_SLOT` stands for the medium of the same rank.

    Raises:
        UserError: for half of a surrogate pair in the text, as JSON can hold it.
        ValueError: if the number of slots differs from the number of media, or a medium is none.
    """

    text: str
    media: tuple[Medium, ...] = ()

    def __post_init__(self) -> None:
        if type(self.media) is not tuple:  # equal items are equal, however they were written
            alone = isinstance(self.media, Medium)
            object.__setattr__(self, "media", (self.media,) if alone else tuple(self.media))
        for medium in self.media:
            if not isinstance(medium, Medium):
                raise ValueError(
                    "an Item's media are paths (Path), bytes or PIL images, "
                    f"not {type(medium).__name__}"
                )
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode ({error}); fix it") from error
        slots = self.text.count(IMAGE_SLOT)
        if slots != len(self.media):
            raise ValueError(
                f"the text has {slots} image placeholder(s) for {len(self.media)} image(s)"
            )

    @property
    def plain_text(self) -> str:
        """The words alone, without slots."""
        return self.text.replace(IMAGE_SLOT, "").strip()

    @property
    def key(self) -> int:
        """63 bits that name text and media; equal items are never each other's negatives."""
        digest = hashlib.blake2b(self.text.encode(), digest_size=8)
        for medium in self.media:
            digest.update(b"\0" + _source_bytes(medium))
        return as_key(digest.digest())


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and what it should retrieve, with optional hard negatives.

    `row_id` names the row to a person, e.g. `"MSCOCO_i2t row 812"`; every error about the row
    carries it.
    """

    query: Item
    positive: Item
    negatives: tuple[Item, ...]
    subset: str
    row_id: str


@dataclass(frozen=True)
class EvalSubset:
    """One benchmark subset; every distinct query and candidate occurs once and is encoded once.

    Attributes:
        group: one of `GROUPS`.
        query_index: int32 [Q], row -> position in `queries`.
        candidate_index: for each row int32 [C], positions in `candidates`, the positive first.
        row_ids: for each row its name in messages, e.g. `"RefCOCO row 17"`.
    """

    name: str
    group: str
    in_distribution: bool
    queries: list[Item]
    candidates: list[Item]
    query_index: np.ndarray
    candidate_index: Sequence[np.ndarray]
    row_ids: list[str]

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise UserError(f"{self.name}: group {self.group!r} is not one of {', '.join(GROUPS)}")


def as_key(digest: bytes) -> int:
    """8 bytes of a hash as 63 bits, which fit into an int64 without a sign."""
    return int.from_bytes(digest, "little") >> 1


def _source_bytes(medium: Medium) -> bytes:
    if isinstance(medium, Path):
        return os.fsencode(medium)  # a name need not be text
    if isinstance(medium, bytes):
        return medium
    # The same bytes are another picture in another shape, with other colours of their palette, or
    # turned.
    turned = medium.getexif().get(Base.Orientation)
    seen_as = (
        *(medium.mode, medium.size, medium.getpalette()),
        *(medium.info.get("transparency"), turned),
    )
    return repr(seen_as).encode() + medium.tobytes()


def numbered(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """Distinct items in order of occurrence, and the position of each given item among them."""
    known: dict[int, int] = {}
    distinct: list[Item] = []
    for item in items:
        if known.setdefault(item.key, len(distinct)) == len(distinct):
            distinct.append(item)
    return distinct, [known[item.key] for item in items]


# --- Where media stand in a text ---

PLACEHOLDER = "<|image_1|>"  # Phi-3's, which MMEB writes for every model


def placed(text: str, images: int) -> str:
    """A text with a slot where each of its images stands.

    `<|image_k|>` stands for image k, `<image>` for the next one; without any, images come first, on
    a line of their own. Without images `<image>` is words.

    Raises:
        UserError: for placeholders that do not fit the images.
    """
    # Millions of rows have one image or none, and no placeholder or one: no template is needed.
    others = text.replace(PLACEHOLDER, "", images)
    if images > 1 or "<|image_" in others or "<image>" in others or IMAGE_SLOT in others:
        found: str = TEMPLATE.placed(text, images)
        return found
    if images and others == text:
        return f"{IMAGE_SLOT}\n{text}" if text else IMAGE_SLOT
    return text.replace(PLACEHOLDER, IMAGE_SLOT)


def template_source(*, image: str, special_tokens: Sequence[str]) -> str:
    """The template for a tool that renders messages.

    Args:
        image: what stands for an image in the text that is tokenized.
        special_tokens: what a blank of no width goes into where a user has written it.
    """
    template = files("cocoa_pl.data").joinpath("chat_template.j2").read_text(encoding="utf-8")
    for name, value in (("SLOT", IMAGE_SLOT), ("IMAGE", image), ("TOKENS", list(special_tokens))):
        template = template.replace(name, ascii(value))
    return template.strip()


def _refuse(message: str) -> NoReturn:
    raise UserError(message, kind="placeholder_mismatch")


def _compiled() -> Any:
    environment = Environment(undefined=StrictUndefined)
    environment.globals["raise_exception"] = _refuse
    source = template_source(image=IMAGE_SLOT, special_tokens=())
    return environment.from_string(source).make_module({"messages": ()})


TEMPLATE: Any = _compiled()


# --- What users of the library pass in ---

Input = str | Picture | Item | Mapping[str, Any]

_SINGLE = (str, bytes, bytearray, memoryview, os.PathLike, Image, Item, Mapping, io.IOBase)


def as_list(items: Iterable[Input]) -> Sequence[Input]:
    """Items in their own order, to be asked for by place.

    A `Sequence` or a data set of `datasets` stays what it is, and is read when it is its turn. What
    else has an order becomes a list: a pandas or polars Series, whose labels are no places, an
    array of strings or of pictures, a generator.

    Raises:
        UserError: for a single item, and for what has no order or no items.
    """
    if isinstance(items, _SINGLE) or not isinstance(items, Iterable):
        raise UserError(f"items come in a list; write [item] for a single {type(items).__name__}")
    if isinstance(items, set | frozenset):
        raise UserError("a set has no order; write sorted(items)")
    if any(base.__name__ == "DataFrame" for base in type(items).__mro__):
        raise UserError("a table is no list; take a column, or rows: table.to_dict('records')")
    if isinstance(items, np.ndarray) and items.ndim not in (1, 4):
        raise UserError(
            f"an array of shape {items.shape} is taken for one picture; write [array], or "
            "list(array) for several without colours"
        )
    datasets = sys.modules.get("datasets")  # imported, if there is a data set of it
    if isinstance(items, Sequence) or (datasets and isinstance(items, datasets.Dataset)):
        return items
    return list(items)


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
    item = value if isinstance(value, Item) else _item(value)
    return Item(TEMPLATE.instructed(item.text, instruction), item.media) if instruction else item


def _item(value: Input) -> Item:
    is_image = isinstance(value, bytes | os.PathLike | Image | np.ndarray)
    if isinstance(value, str):
        value = {"text": value}
    elif is_image or embedded(value) is not value:
        value = {"image": value}
    if not isinstance(value, Mapping):
        raise UserError(
            "an item is a string, an image (a path, bytes, a PIL image or an array), a dict or an "
            f"Item, not {type(value).__name__}; convert it to one of these, or leave it out"
        )
    if unknown := set(value) - {"text", "image"}:
        raise UserError(
            f"an item has the keys text and image, not {sorted(map(str, unknown))}; rename or drop "
            "the others"
        )
    text = value.get("text")
    text = "" if _is_missing(text) else text
    if not isinstance(text, str):
        raise UserError(f"an item's text is a string, not {type(text).__name__}; convert it")
    images = tuple(map(as_source, _pictures(value.get("image"))))
    if not text and not images:
        raise UserError("an item needs a text or an image; this one is empty")
    return Item(placed(str(text), len(images)), images)


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
