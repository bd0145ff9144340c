"""Fixed inputs in, their vectors out: what an exported model must reproduce when it is loaded.

Digests tell models apart that are so alike that their vectors of a few inputs do not.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and every bit of these tensors; the same on any device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content.data)
    return digest.hexdigest()


def digest_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
