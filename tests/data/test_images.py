"""Unusual image files are read correctly or refused with a message."""

import io
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cocoa_pl
from cocoa_pl.data.images import FORMATS, image_size, open_image, resolve_image
from cocoa_pl.errors import UserError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def _saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def _pixel(source: Path | bytes | Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = open_image(source)
    assert image.mode == "RGB"
    value = image.getpixel(at)
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff"])
def test_truncated_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    path = _saved(Image.fromarray(noise), tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    appledouble = b"\0\5\x16\7\0\2\0\0Mac OS X"  # macOS leaves such files in archives
    for content in (b"", whole[: len(whole) // 20], whole[: len(whole) // 2], appledouble):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^image .*a\.{suffix} cannot be read"):
            open_image(path)


def test_broken_png_checksum_is_an_error(tmp_path: Path) -> None:
    path = _saved(Image.new("RGB", (20, 20), RED), tmp_path / "a.png")
    data = bytearray(path.read_bytes())
    data[50] ^= 0xFF
    with pytest.raises(UserError, match=r"the encoded image \(\d+ bytes\) cannot be read"):
        open_image(bytes(data))


def test_too_elongated_image_is_an_error_from_a_ratio_of_200(tmp_path: Path) -> None:
    for width, height in ((1, 10000), (10000, 1), (2, 401)):
        path = _saved(Image.new("RGB", (width, height)), tmp_path / "line.png")
        with pytest.raises(UserError, match=rf"^image .*line\.png is {width} x {height} pixels"):
            open_image(path)
    path = _saved(Image.new("RGB", (400, 2)), tmp_path / "line.png")
    assert open_image(path).size == (400, 2)


def test_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(Image.new("L", (100, 100)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read"):
        open_image(path)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), WHITE)
    image.paste(RED, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown rotated by 90 degrees clockwise
    path = _saved(image, tmp_path / "turned.png", exif=exif)
    upright = open_image(path)
    assert upright.size == (10, 20)
    assert upright.getpixel((9, 0)) == RED
    assert upright.getpixel((0, 0)) == WHITE


def test_what_is_transparent_is_laid_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    path = _saved(rgba, tmp_path / "rgba.png")
    assert (_pixel(path), _pixel(path, (1, 0)), _pixel(rgba, (1, 0))) == (RED, WHITE, WHITE)
    assert rgba.getpixel((1, 0)) == (0, 0, 0, 0)  # an opened image is not changed
    path = _saved(Image.new("LA", (1, 1), (0, 128)), tmp_path / "grey.png")
    assert _pixel(path) == (127, 127, 127)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    path = _saved(palette, tmp_path / "palette.png", transparency=0)
    assert (_pixel(path), _pixel(path, (1, 0))) == (WHITE, RED)


def _pgm(white: int) -> bytes:
    """Pixels 0, white // 2, white."""
    return f"P5 3 1 {white}\n".encode() + np.array([0, white // 2, white], ">u2").tobytes()


def _tiff(bits: int, *, black_is_zero: bool) -> bytes:
    """The same of so many bits; by hand, because Pillow writes 16 bits with black as zero only."""
    values = (0, 2 ** (bits - 1) - 1, 2**bits - 1)
    pixels = np.array(values, "<u2").tobytes()
    if bits == 12:  # packed without gaps
        pixels = int("".join(f"{value:012b}" for value in values) + "0" * 12, 2).to_bytes(6, "big")
    tags = {256: 3, 257: 1, 258: bits, 259: 1, 262: int(black_is_zero)}
    tags |= {273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    header = b"II" + struct.pack("<HI", 42, 8 + len(pixels))
    return header + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (_pgm(1000), [0, 128, 255]),
        (_pgm(65535), [0, 127, 255]),
        (_tiff(12, black_is_zero=True), [0, 127, 255]),
        (_tiff(16, black_is_zero=True), [0, 127, 255]),
        (_tiff(16, black_is_zero=False), [255, 128, 0]),
    ],
)
def test_full_brightness_is_what_the_file_calls_so(encoded: bytes, expected: list[int]) -> None:
    for source in (encoded, Image.open(io.BytesIO(encoded))):
        assert [_pixel(source, (x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_brightness_range_that_no_format_defines_is_refused(tmp_path: Path, dtype: type) -> None:
    image = Image.fromarray(np.full((2, 2), 200, dtype=dtype))
    for source in (image, _saved(image, tmp_path / "a.tiff")):
        with pytest.raises(UserError, match=r"^.* has signed or 32-bit pixels"):
            open_image(source)


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "LAB", "HSV", "YCbCr", "CMYK", "1"])
def test_rare_modes_are_converted(mode: str) -> None:
    assert open_image(Image.new(mode, (2, 2))).mode == "RGB"


def test_an_image_is_given_in_many_ways(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3))
    path = _saved(image, tmp_path / "a.png")
    embedded = {"bytes": path.read_bytes(), "path": "elsewhere.png"}
    by_path = {"bytes": None, "path": str(path)}
    for way in (path, path.read_bytes(), image, str(path), np.asarray(image), embedded, by_path):
        np.testing.assert_array_equal(np.asarray(cocoa_pl.open_image(way)), np.asarray(image))
    for wrong in (None, {"url": "x"}):
        with pytest.raises(UserError, match=r"^an image"):
            open_image(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_threads_may_share_an_opened_image(kind: str) -> None:
    noise = np.random.default_rng(0).integers(256, size=(600, 800, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(buffer, kind, exif=exif)
    expected = np.asarray(open_image(buffer.getvalue()))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            shared = Image.open(io.BytesIO(buffer.getvalue()))
            for found in pool.map(open_image, [shared] * 8):
                np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PDF"])
def test_only_formats_of_pictures_are_decoded(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), RED).save(buffer, kind)
    with pytest.raises(UserError, match=r"its content is none of AVIF, BMP, .*WEBP"):
        open_image(buffer.getvalue())


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "PPM"])
def test_each_format_is_decoded(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), RED).save(buffer, kind)
    assert open_image(buffer.getvalue()).size == (32, 16)


def test_pixels_are_bounded_by_the_header_and_a_jpeg_is_decoded_smaller() -> None:
    def encoded(kind: str) -> bytes:
        Image.new("RGB", (1600, 800), RED).save(buffer := io.BytesIO(), kind)
        return buffer.getvalue()

    assert open_image(encoded("JPEG"), at_least=200, most_pixels=80_000).size == (400, 200)
    assert open_image(encoded("PNG"), at_least=200).size == (1600, 800)
    for kind in ("PNG", "JPEG"):
        cut = encoded(kind)[:-300]  # it would be an error to decode it
        with pytest.raises(UserError, match="is 1600 x 800 pixels, more than 80,000; scale it"):
            open_image(cut, most_pixels=80_000)


def test_a_size_is_read_from_the_header(
    tmp_path: Path, make_image: Callable[..., Image.Image]
) -> None:
    image, buffer = make_image((70, 40)), io.BytesIO()
    image.save(buffer, "PNG")
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]  # pixels are cut off
    (tmp_path / "half.png").write_bytes(half)
    for source in (tmp_path / "half.png", half, image):
        assert image_size(source) == (70, 40)
    for bad, message in (
        (tmp_path / "none.png", r"image .*none\.png does not exist"),
        (b"no picture", ".* cannot be read"),
        (Image.new("RGB", (1000, 2)), ".* is 1000 x 2 pixels"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            image_size(bad)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE, (0, 0, 255))]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as opened:
        assert _pixel(path) == _pixel(opened) == _pixel(opened) == RED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(folder / "sub" / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    return folder


@pytest.mark.parametrize("relative", ["sub/a.png", "./sub/a.png", "sub/../sub/a.png"])
def test_path_below_the_root_is_found(root: Path, relative: str) -> None:
    assert resolve_image(relative, root=root).samefile(root / "sub" / "a.png")


def test_path_that_leaves_the_root_is_an_error(root: Path) -> None:
    (root / "file.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    twin = root.parent / "root_twin"  # which begins as the root does
    twin.mkdir()
    Image.new("RGB", (2, 2)).save(twin / "a.png")
    dots = ("../secret.png", "sub/../../secret.png", "..", "sub/..", "../root_twin/a.png")
    for relative in (*dots, "file.png", "folder/secret.png"):
        with pytest.raises(UserError, match=r"^image path .* leaves the image root"):
            resolve_image(relative, root=root)
    with pytest.raises(UserError, match="is absolute"):  # even below the root
        resolve_image(str(root / "sub" / "a.png"), root=root)


def test_links_within_the_root_and_a_linked_root_work(root: Path) -> None:
    (root / "link.png").symlink_to(root / "sub" / "a.png")
    linked = root.parent / "linked"
    linked.symlink_to(root)
    assert resolve_image("link.png", root=linked).is_file()


@pytest.mark.parametrize("relative", ["sub/b.png", "sub", "x" * 5000, "a\0.png", "sub\0/a.png"])
def test_missing_file_below_the_root_is_an_error(root: Path, relative: str) -> None:
    reasons = r"is not a path|is no path|does not exist|is no file, but|x\.\.\. cannot be reached"
    with pytest.raises(UserError, match=reasons):
        resolve_image(relative, root=root)
