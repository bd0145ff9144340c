"""Fixed inputs in, their vectors out: what an exported model must reproduce when it is loaded."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cocoa_pl.errors import UserError
from cocoa_pl.items import IMAGE_SLOT, Item

Encode = Callable[[Sequence[Item]], NDArray[np.float32]]

# Largest difference of a vector component: other kernels and thread counts round differently, other
# weights differ more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


def take_fingerprint(encode: Encode) -> NDArray[np.float32]:
    """Vectors of a text, an image, and both: (3, D)."""
    ramp = np.linspace(0, 255, 56, dtype=np.uint8)
    pixels = np.stack([*np.meshgrid(ramp, ramp), np.full((56, 56), 128, np.uint8)], axis=2)
    image = Image.fromarray(pixels)
    return encode(
        [
            Item("a seven at the top left"),
            Item(IMAGE_SLOT, (image,)),
            Item(f"{IMAGE_SLOT}what is in this picture?", (image,)),
        ]
    )


def check_fingerprint(
    encode: Encode, expected: NDArray[np.float32], *, dtype: str, where: str
) -> None:
    """Compare with the vectors taken at export.

    Raises:
        UserError: if one differs: weights, tokenizer, preprocessing or attention are not the
            exported ones.
    """
    found = take_fingerprint(encode)
    if found.shape != expected.shape:
        raise UserError(
            f"{where}: vectors have {found.shape[1]} dimensions, not {expected.shape[1]}"
        )
    worst = float(np.abs(found - expected).max())
    if not worst <= TOLERANCE[dtype]:
        raise UserError(
            f"{where}: the model does not give the vectors it was exported with (largest "
            f"difference {worst:.2g}); weights, tokenizer or attention were changed since"
        )
