"""Dataset rows in, model-independent inputs out: an `Item` is one text with images, a `Pair` two of
them.

Images stay what the dataset gave (a path, encoded bytes, an opened image) until a worker needs
pixels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.ExifTags import Base
from PIL.Image import Image

# A noncharacter: Unicode keeps it for inside use, so no text that people exchange holds it. Readers
# translate placeholders (MMEB: <|image_1|>) to it once; a model's own image token never occurs in
# an Item's text.
IMAGE_SLOT = "\ufdd0"

ImageSource = Path | bytes | Image


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to embed: a text in which each `IMAGE_SLOT` stands for the image of the same rank.

    Raises:
        ValueError: if the number of slots differs from the number of images, or an image is none.
    """

    text: str
    images: tuple[ImageSource, ...] = ()

    def __post_init__(self) -> None:
        if type(self.images) is not tuple:  # equal items are equal, however they were written
            alone = isinstance(self.images, ImageSource)
            object.__setattr__(self, "images", (self.images,) if alone else tuple(self.images))
        for image in self.images:
            if not isinstance(image, ImageSource):
                raise ValueError(
                    "an Item's images are paths (Path), bytes or PIL images, "
                    f"not {type(image).__name__}"
                )
        slots = self.text.count(IMAGE_SLOT)
        if slots != len(self.images):
            raise ValueError(
                f"the text has {slots} image placeholder(s) for {len(self.images)} image(s)"
            )

    @property
    def plain_text(self) -> str:
        """The words alone, without image slots."""
        return self.text.replace(IMAGE_SLOT, "").strip()

    @property
    def key(self) -> int:
        """A stable 63-bit identity of text and image sources; equal items are never each other's
        negatives.
        """
        digest = hashlib.blake2b(self.text.encode(), digest_size=8)
        for image in self.images:
            digest.update(b"\0" + _source_bytes(image))
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


def as_key(digest: bytes) -> int:
    """8 bytes of a hash as 63 bits, which fit into an int64 without a sign."""
    return int.from_bytes(digest, "little") >> 1


def _source_bytes(image: ImageSource) -> bytes:
    if isinstance(image, Path):
        return str(image).encode()
    if isinstance(image, bytes):
        return image
    # The same bytes are another picture in another shape, with other colours of their palette, or
    # turned.
    turned = image.getexif().get(Base.Orientation)
    seen_as = (image.mode, image.size, image.getpalette(), image.info.get("transparency"), turned)
    return repr(seen_as).encode() + image.tobytes()


def numbered(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """Distinct items in order of occurrence, and the position of each given item among them."""
    known: dict[int, int] = {}
    distinct: list[Item] = []
    for item in items:
        if known.setdefault(item.key, len(distinct)) == len(distinct):
            distinct.append(item)
    return distinct, [known[item.key] for item in items]
