"""An RGB picture in, resized as the model asks and cut into uint8 patches, in the order of the
vision tower, out.

The stock image processor does the same in float32, with every frame repeated. Here pixels stay
bytes: an eighth of what goes to the device, and bit-equal after `Backbone.pixels`.
"""

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize


def resize(image: Image, *, min_pixels: int, max_pixels: int, factor: int, resample: int) -> Image:
    """The picture with both sides multiples of `factor`, its area within the bounds, its shape kept
    as well as that allows.

    What the stock processor does, on the picture itself instead of on two copies of it as arrays.

    Args:
        resample: a filter of Pillow, by number.
    """
    height, width = smart_resize(
        image.height, image.width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    return image.resize((width, height), resample=Resampling(resample))


def cut(image: Image, *, patch_size: int, merge_size: int) -> NDArray[np.uint8]:
    """Patches of an RGB picture whose sides are multiples of `patch_size * merge_size`.

    The patches of one visual token lie together; within a patch channels come first. For sides of
    two visual tokens of 2 x 2 patches:

         0  1 |  4  5
         2  3 |  6  7
        ------+------
         8  9 | 12 13
        10 11 | 14 15

    Returns:
        (p, channels * patch_size ** 2).
    """
    rows, columns = (side // (patch_size * merge_size) for side in (image.height, image.width))
    patches = np.empty((rows, columns, merge_size, merge_size, 3, patch_size, patch_size), np.uint8)
    # A row of a patch is contiguous on both sides: it is moved as one item, not byte by byte.
    item = np.dtype((np.void, patch_size))
    places = patches.view(item)[..., 0].transpose(4, 0, 2, 5, 1, 3)
    for place, channel in zip(places, image.split(), strict=True):
        place[...] = np.asarray(channel).view(item).reshape(place.shape)
    return patches.reshape(rows * columns * merge_size**2, 3 * patch_size**2)
