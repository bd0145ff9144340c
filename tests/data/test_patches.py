"""Resizing and cutting against the stock image processor and against a pixel-by-pixel twin."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_pl.data.patches import cut, resize

MakeImage = Callable[..., Image.Image]
SIZES = [(448, 448), (644, 476), (56, 28), (28, 84), (1120, 28)]  # width, height
MIN_PIXELS, MAX_PIXELS = 56 * 56, 448 * 448


@pytest.fixture(scope="module")
def stock() -> Any:
    return Qwen2VLImageProcessorPil()


def slow_cut(image: Image.Image, *, side: int, merge: int) -> list[list[int]]:
    """Values of each patch, as the order reads."""
    pixels = np.asarray(image).tolist()
    found = []
    for top in range(0, image.height, merge * side):
        for left in range(0, image.width, merge * side):
            for patch in range(merge**2):
                y, x = top + patch // merge * side, left + patch % merge * side
                found.append(
                    [
                        pixels[y + row][x + column][channel]
                        for channel in range(3)
                        for row in range(side)
                        for column in range(side)
                    ]
                )
    return found


@pytest.mark.parametrize(
    ("side", "merge", "tokens"), [(14, 2, (2, 3)), (16, 2, (1, 2)), (3, 1, (4, 2))]
)
def test_patches_equal_their_slow_twin(
    side: int, merge: int, tokens: tuple[int, int], make_image: MakeImage
) -> None:
    image = make_image((tokens[0] * side * merge, tokens[1] * side * merge))
    found = cut(image, patch_size=side, merge_size=merge)
    assert found.dtype == np.uint8
    assert found.tolist() == slow_cut(image, side=side, merge=merge)


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_those_of_the_stock_processor(
    size: tuple[int, int], stock: Any, make_image: MakeImage
) -> None:
    image = make_image(size)
    expected, height, width = stock.patchify(
        np.asarray(image).transpose(2, 0, 1), patch_size=14, merge_size=2, temporal_patch_size=1
    )
    found = cut(image, patch_size=14, merge_size=2)
    assert len(found) == height * width
    assert np.array_equal(found, expected)
    assert found.flags.writeable  # torch takes the memory over
    assert found.flags.c_contiguous


@pytest.mark.parametrize("size", [*SIZES, (5, 9), (30, 90), (1000, 41), (640, 480), (1, 150)])
def test_resizing_is_bit_equal_to_the_stock_processor(
    size: tuple[int, int], stock: Any, make_image: MakeImage
) -> None:
    image = make_image(size)
    expected = stock.resize(
        np.asarray(image).transpose(2, 0, 1),
        size=SizeDict(shortest_edge=MIN_PIXELS, longest_edge=MAX_PIXELS),
        resample=stock.resample,
        factor=28,
    )
    found = resize(
        image, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, factor=28, resample=stock.resample
    )
    assert np.array_equal(np.asarray(found).transpose(2, 0, 1), expected)
    assert (found.width % 28, found.height % 28) == (0, 0)
