"""Images are decoded to upright 8-bit RGB; what cannot be read exactly is refused."""

import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from cocoa_pl.errors import REMEDIES, UserError, absent

# Qwen2-VL's resizing refuses anything longer, without naming the row.
MAX_ASPECT_RATIO = 200

# What is decoded, of all that Pillow knows: each further decoder is one more that hostile files can
# choose, and EPS starts another program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

MOST_SHOWN = 1000  # characters of a path in messages; a data URL is no path

# What Pillow's decoders raise on broken files; OSError includes UnidentifiedImageError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


ImageSource = Path | bytes | Image.Image
Picture = ImageSource | str | os.PathLike[str] | NDArray[np.uint8] | Mapping[str, Any]

# Pillow reads an opened file when it is first asked for pixels, and no two threads may do so at
# once. One lock for all would have threads wait for each other: PNGs were read at 3/4 of the speed.
_LOADING = tuple(threading.Lock() for _ in range(64))


def as_source(value: object) -> ImageSource:
    """An image as users and `datasets` have it: also a path as a string, an array, or
    `{"bytes", "path"}`.

    Raises:
        UserError: for anything else.
    """
    value = embedded(value)
    if isinstance(value, Path | bytes | Image.Image):
        return value
    if isinstance(value, str) and not value:
        raise UserError("an image's path is empty; leave the image out")
    if isinstance(value, str | os.PathLike):
        return Path(value)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or value.shape[2:] not in ((), (3,)):
            raise UserError(
                "an image's array is uint8 of height x width x 3, or height x width, not "
                f"{value.dtype} of {' x '.join(map(str, value.shape))}; scale it to 0 "
                "to 255 and astype('uint8'), put colours last, drop alpha"
            )
        return Image.fromarray(value)
    raise UserError(
        f"an image is a path, bytes, a PIL image or an array, not {type(value).__name__}; open it "
        "as one of these"
    )


def embedded(image: object) -> object:
    """Of an image as `datasets` keeps it, `{"bytes", "path"}`: bytes, else path, else None.

    Anything else is left as it is.
    """
    if isinstance(image, dict) and set(image) <= {"bytes", "path"}:
        return image.get("bytes") or image.get("path") or None
    return image


def open_image(
    source: Picture, *, at_least: int | None = None, most_pixels: int | None = None
) -> Image.Image:
    """Decode one image: RGB, EXIF rotation applied, transparency over white, first frame (of an
    opened one the frame at hand).

    16-bit greyscale is scaled to 8 bits by its format's full brightness, never by its values.

    Args:
        source: a path, an encoded image's bytes, an opened image, or a uint8 array.
        at_least: pixels that both sides need; a JPEG may be decoded at a half, quarter or eighth of
            its size. None for full size.
        most_pixels: of what is decoded; more are refused by the header. None for Pillow's bound.

    Raises:
        UserError: missing, empty, corrupt or truncated file; a side more than 200 times the other;
            signed or 32-bit pixels, which have no defined brightness. Names the file.
    """
    source = as_source(source)
    with _opened(source) as opened:
        if at_least is not None:
            opened.draft(None, (at_least, at_least))
        if most_pixels is not None and opened.width * opened.height > most_pixels:
            why = f"is {opened.width} x {opened.height} pixels, more than {most_pixels:,}; scale it"
            raise _refused(source, "", why)
        image = _in_rgb(ImageOps.exif_transpose(opened), _black_and_white(opened))
    if image is None:
        raise _refused(
            *(source, "corrupt_image"),
            "has signed or 32-bit pixels, whose brightness range is undefined; save it with 8 or "
            "16 bits",
        )
    _check_aspect_ratio(image.size, source)
    return image


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of an image as they stand in its header; no pixel is decoded.

    Raises:
        UserError: if `open_image` would refuse the file for what its header says.
    """
    with _opened(source) as image:
        size = image.size
    _check_aspect_ratio(size, source)
    return size


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image with its header read; what Pillow raises meanwhile, about its pixels too, is said
    in one sentence.
    """
    if isinstance(source, Path):
        _check_file(source)
    try:
        if isinstance(source, Image.Image):
            with _LOADING[id(source) // 64 % len(_LOADING)]:
                yield source
        else:
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except UserError:
        raise
    except _DECODING_ERRORS as error:
        # Pillow's own words name the buffer that it read from by its address.
        is_unknown = isinstance(error, UnidentifiedImageError)
        why = f"its content is none of {', '.join(FORMATS)}" if is_unknown else str(error)
        if isinstance(error, OSError) and error.strerror:  # nothing of its content
            why = f"cannot be read: {error.strerror}; {REMEDIES.get(error.errno or 0, 'try again')}"
            raise _refused(source, "unreadable_file", why) from error
        why = f"cannot be read as an image ({why}); replace it or drop the row"
        raise _refused(source, "corrupt_image", why) from error


def _check_file(path: Path) -> None:
    """Refuse what is no file: a pipe would be waited for."""
    name = str(path)
    if name.startswith("data:"):
        why = "is a data URL; pass its bytes: base64.b64decode(url.partition(',')[2])"
    elif re.match(r"[a-z][a-z0-9+.-]+:/", name):
        why = "is an address; download it and pass the file"
    elif os.path.isfile(path):
        return
    else:
        raise _missing(path)
    raise _refused(path, "missing_image", why)


def _check_aspect_ratio(size: tuple[int, int], source: ImageSource) -> None:
    """Refuse a picture whose long side is more than `MAX_ASPECT_RATIO` times its short side."""
    width, height = size
    if not min(size):
        why = f"has no pixels ({width} x {height}); replace it or drop the row"
        raise _refused(source, "corrupt_image", why)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise _refused(
            *(source, "elongated_image"),
            f"is {width} x {height} pixels; the longer side may be at most {MAX_ASPECT_RATIO} "
            "times the shorter; crop it or drop the row",
        )


def _refused(source: ImageSource, kind: str, why: str) -> UserError:
    """The error about an image, which is named by its path, or else by what is known of it."""
    if isinstance(source, Path):
        name = str(source)
        if len(name) > MOST_SHOWN or name.startswith("data:"):
            name = f"{name[:40]}..."
        return UserError(f"image {name} {why}", kind=kind, file=source)
    if isinstance(source, bytes):
        name = f"the encoded image ({len(source)} bytes)"
    else:
        name = f"the image ({source.width} x {source.height}, mode {source.mode})"
    return UserError(f"{name} {why}", kind=kind)


def _missing(path: str | Path) -> UserError:
    advice = "check the path and the image root"
    return absent(path, advice, what="image", kind="missing_image")


def resolve_image(relative: str, *, root: Path) -> Path:
    """The file that `relative` names below `root`.

    Raises:
        UserError: the path is absolute, leaves the root (by `..` or by a link), or is not a file.
    """
    path = os.path.join(root, relative)

    def refused(kind: str, message: str) -> UserError:
        return UserError(message, kind=kind, file=path)

    if os.path.isabs(relative):
        raise refused(
            "path_outside_root",
            f"image path {relative!r} is absolute; write it relative to the image root {root}",
        )
    try:
        real = real_path(path)
    except ValueError as error:  # a null byte or an unpaired surrogate
        raise refused(
            "missing_image", f"image path {relative!r} is not a path ({error})"
        ) from error
    if not real.startswith(_real_folder(str(root)).rstrip(os.sep) + os.sep):
        raise refused(
            "path_outside_root",
            f"image path {relative!r} leaves the image root {root} (it leads to {real}); "
            "move the file below the root, or set the image root to a folder above both",
        )
    if not os.path.isfile(real):
        raise _missing(path)
    return Path(path)


def file_state(found: os.stat_result) -> str:
    """What changes with a file's content. The time of change counts beside that of modification,
    which archives and `cp -p` set back, and which files swapped for each other keep.
    """
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


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


def _in_rgb(image: Image.Image, ends: tuple[int, int] | None) -> Image.Image | None:
    """A decoded picture in RGB; None where full brightness is undefined."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        if ends is None:
            return None
        black, white = ends
        values = np.asarray(image).astype(np.float64)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            values[values == transparent] = white
        narrowed = np.rint((values - black) * 255 / (white - black)).astype(np.uint8)
        return Image.fromarray(narrowed).convert("RGB")
    if image.has_transparency_data:
        # Pillow knows no way from premultiplied grey to colours.
        straight = image.convert("LA") if image.mode == "La" else image
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, straight.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _black_and_white(image: Image.Image) -> tuple[int, int] | None:
    """Both ends of the brightness of wide grey pixels in the file's format; None if undefined."""
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        white = 2 ** image.tag_v2[BITSPERSAMPLE][0] - 1  # 12 bits are not scaled to 16
        white_is_zero = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION, 0) == 0
        return (white, 0) if white_is_zero else (0, white)
    # Pillow scales PGM's deeper pixels to 16 bits.
    is_known = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    return (0, 65535) if is_known else None
