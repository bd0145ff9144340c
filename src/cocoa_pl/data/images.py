"""An image source in, an upright 8-bit RGB picture out, or an error that names row and file.

No image is ever made up: what cannot be read exactly is refused.
"""

import io
import os
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cocoa_pl.errors import UserError
from cocoa_pl.items import ImageSource

# Qwen2-VL's resizing refuses anything longer, without naming the row.
MAX_ASPECT_RATIO = 200

# What Pillow's decoders raise on broken files; OSError includes UnidentifiedImageError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_image(source: ImageSource, *, where: str) -> Image.Image:
    """Decode one image: RGB, EXIF rotation applied, transparency over white, first frame.

    16-bit greyscale is scaled to 8 bits; CMYK and palettes are converted.

    Raises:
        UserError: missing, empty, corrupt or truncated file; a side more than 200 times the other;
            32-bit pixels, which have no defined brightness. Names `where` and the file.
    """
    name = _describe(source)
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"{where}: {name} does not exist; check the path and the image root")
    try:
        image = _decode(source)
    except _DECODING_ERRORS as error:
        raise UserError(
            f"{where}: {name} cannot be read as an image ({error}); replace it or drop the row"
        ) from error
    check_aspect_ratio(image.size, where=f"{where}: {name}")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_from_wide(image, where=f"{where}: {name}").convert("RGB")
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def image_size(source: ImageSource, *, where: str) -> tuple[int, int]:
    """Width and height of an image as they stand in its header; no pixel is decoded.

    Raises:
        UserError: if `open_image` would refuse the file for what its header says.
    """
    name = _describe(source)
    if isinstance(source, Image.Image):
        size = source.size
    else:
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                size = image.size
        except _DECODING_ERRORS as error:
            raise UserError(f"{where}: {name} cannot be read as an image ({error})") from error
    check_aspect_ratio(size, where=f"{where}: {name}")
    return size


def check_aspect_ratio(size: tuple[int, int], *, where: str) -> None:
    """Refuse a picture whose long side is more than `MAX_ASPECT_RATIO` times its short side."""
    width, height = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise UserError(
            f"{where} is {width} x {height} pixels; the longer side may be at most "
            f"{MAX_ASPECT_RATIO} times the shorter; crop it or drop the row"
        )


def resolve_image(relative: str, *, root: Path, where: str) -> Path:
    """The file that `relative` names below `root`.

    Raises:
        UserError: the path is absolute, leaves the root (by `..` or by a link), or is not a file.
    """
    if os.path.isabs(relative):
        raise UserError(
            f"{where}: image path {relative!r} is absolute; "
            f"write it relative to the image root {root}"
        )
    path = os.path.join(root, relative)
    try:
        real = real_path(path)
    except ValueError as error:  # a null byte or an unpaired surrogate
        raise UserError(f"{where}: image path {relative!r} is not a path ({error})") from error
    if not real.startswith(_real_folder(str(root)).rstrip(os.sep) + os.sep):
        raise UserError(
            f"{where}: image path {relative!r} leaves the image root {root} (it leads to {real}); "
            "move the file below the root, or set the image root to a folder above both"
        )
    if not os.path.isfile(real):
        raise UserError(f"{where}: image {path} does not exist; check the path and the image root")
    return Path(path)


def real_path(path: str) -> str:
    """The path without links."""
    # Millions of rows share a few folders: only the last component is looked up for every row.
    folder, name = os.path.split(path)
    real = os.path.join(_real_folder(folder), name)
    if name in (os.curdir, os.pardir) or os.path.islink(real):
        return os.path.realpath(real)
    return real


@lru_cache(maxsize=65536)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _decode(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _grey_from_wide(image: Image.Image, *, where: str) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"{where} has 32-bit pixels, whose brightness range is undefined; "
            "save it with 8 or 16 bits"
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _describe(source: ImageSource) -> str:
    if isinstance(source, Path):
        return f"image {source}"
    if isinstance(source, bytes):
        return f"the encoded image ({len(source)} bytes)"
    return f"the image ({source.width} x {source.height}, mode {source.mode})"
