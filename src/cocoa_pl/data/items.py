"""Items, pairs and evaluation subsets: what rows of data become.

Media stay what the data gave (a path, bytes, an opened picture) until a worker opens them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL.ExifTags import Base

from cocoa_pl.data.images import ImageSource
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
