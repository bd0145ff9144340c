"""Fixed inputs in, their vectors out: what an exported model must reproduce when it is loaded.

Digests tell exactly whether files and weights are the same; the fingerprint tells what they cannot:
whether other versions of libraries, or other kernels, still make the same vectors of them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cocoa_pl.errors import UserError
from cocoa_pl.items import IMAGE_SLOT, Item

Encode = Callable[[Sequence[Item]], NDArray[np.float32]]

# Largest difference of a vector component: other kernels and thread counts round differently, other
# weights differ more. Between a CPU and a GPU too: float32 is not TF32 there unless asked for.
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
        UserError: if one differs: what computes them is not what computed them at export.
    """
    worst = float(np.abs(take_fingerprint(encode) - expected).max())
    if not worst <= TOLERANCE[dtype]:
        raise UserError(
            f"{where}: the model does not give the vectors it was exported with (largest "
            f"difference {worst:.2g}), and its files are the same: another version of torch or "
            "transformers reads it otherwise"
        )


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and every bit of these tensors; the same on any device."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content.data)
    return digest.hexdigest()


def digest_of_text(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def digest_of_file(path: Path) -> str:
    """Of every byte; some gigabytes a second.

    Raises:
        UserError: if it cannot be read.
    """
    digest, block = xxhash.xxh3_128(), bytearray(1 << 18)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
