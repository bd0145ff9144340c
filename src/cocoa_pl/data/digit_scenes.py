"""Scenes of real handwritten digits: their pictures, their captions, and questions about them.

A layout is a grid of digits and empty cells; its caption says exactly what is where, so equal
captions mean equal layouts. A scene is a layout drawn with particular pieces of handwriting.
Handwriting and layouts are divided into train, validation and test once and for all: no seed can
bring a test digit into training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from cocoa_pl.data.items import PLACEHOLDER

Split = Literal["train", "validation", "test"]
Layout = tuple[int, ...]  # row-major, EMPTY or 0-9 for each cell

EMPTY = -1
CELL = 28  # pixels a side; one visual token of Qwen2-VL
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top left", "top right", "bottom left", "bottom right")
# The centre of a 3 x 3 grid stays empty: no training caption has a word for it.
RING_PLACES = (
    "top left", "top", "top right", "left", "", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip

# (left, right) neighbours that training never shows; each digit is once left and once right.
HELD_OUT_PAIRS = frozenset((left, (7 * left + 3) % 10) for left in range(10))

# Constants, not parameters: training data and benchmark are drawn apart and must agree on these.
_DIVISION_SEED = 2603
_HANDWRITING_SHARES = {"train": 0.60, "validation": 0.15, "test": 0.25}
_RESERVED_LAYOUTS = {"test": 1500, "validation": 1000}

_GLYPH = 24  # pixels a side of a digit inside its cell
_PAPER = 255


@dataclass(frozen=True, slots=True)
class Scene:
    """A layout, and for each cell the handwriting (its index, or EMPTY) and where it lies.

    `offsets` are (down, right) in pixels, 0 to CELL - 24. `image` is the path of the picture, below
    the image root; empty until it is written.
    """

    layout: Layout
    glyphs: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    image: str = ""


@cache
def load_handwriting() -> tuple[np.ndarray, dict[Split, tuple[np.ndarray, ...]]]:
    """All 1797 digits of scikit-learn's `load_digits`, and their division.

    Returns:
        Ink, uint8 [1797, 24, 24], 255 = darkest, enlarged smoothly from 8 x 8 pixels; and split ->
        for each digit 0-9 the indices of its pieces of handwriting, each of one split.
    """
    # Costs a second, and only drawing needs it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [
        Image.fromarray(image).resize((_GLYPH, _GLYPH), Image.Resampling.BICUBIC) for image in small
    ]
    order = np.random.default_rng(_DIVISION_SEED).permutation(len(small))
    by_split: dict[Split, tuple[np.ndarray, ...]] = {"train": (), "validation": (), "test": ()}
    for digit in range(10):
        own = order[digits.target[order] == digit]
        first = round(len(own) * _HANDWRITING_SHARES["train"])
        second = first + round(len(own) * _HANDWRITING_SHARES["validation"])
        for split, part in zip(by_split, np.split(own, [first, second]), strict=True):
            by_split[split] += (part,)
    return np.stack([np.asarray(image) for image in enlarged]), by_split


@cache
def layouts(split: Split | Literal["held_out"]) -> tuple[Layout, ...]:
    """The 2 x 2 layouts of a split, or those with a held-out pair: disjoint, in a fixed order."""
    known = [
        layout
        for layout in product(range(EMPTY, 10), repeat=4)
        if any(digit != EMPTY for digit in layout)
        and bool({layout[:2], layout[2:]} & HELD_OUT_PAIRS) == (split == "held_out")
    ]
    order = np.random.default_rng(_DIVISION_SEED).permutation(len(known))
    test = _RESERVED_LAYOUTS["test"]
    validation = test + _RESERVED_LAYOUTS["validation"]
    part = {
        "held_out": order,
        "test": order[:test],
        "validation": order[test:validation],
        "train": order[validation:],
    }
    return tuple(known[index] for index in part[split])


def ring_layouts(rng: np.random.Generator, *, count: int) -> list[Layout]:
    """Distinct 3 x 3 layouts of three to five digits around an empty centre."""
    cells = [cell for cell, place in enumerate(RING_PLACES) if place]
    found: dict[Layout, None] = {}
    while len(found) < count:
        layout = [EMPTY] * len(RING_PLACES)
        for cell in rng.choice(cells, size=rng.integers(3, 6), replace=False):
            layout[cell] = int(rng.integers(10))
        found[tuple(layout)] = None
    return list(found)


def caption(layout: Layout) -> str:
    """`"three top left, seven top right and five bottom left"`: the digits in reading order."""
    places = PLACES if len(layout) == len(PLACES) else RING_PLACES
    phrases = [
        f"{DIGIT_WORDS[digit]} {place}"
        for digit, place in zip(layout, places, strict=True)
        if digit != EMPTY
    ]
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def compose(layout: Layout, *, split: Split, rng: np.random.Generator) -> Scene:
    """Draw handwriting and positions for a layout."""
    own = load_handwriting()[1][split]
    free = CELL - _GLYPH + 1
    return Scene(
        layout=layout,
        glyphs=tuple(
            EMPTY if digit == EMPTY else int(own[digit][rng.integers(len(own[digit]))])
            for digit in layout
        ),
        offsets=tuple(
            (int(down), int(right)) for down, right in rng.integers(free, size=(len(layout), 2))
        ),
    )


def draw(scene: Scene, *, inverted: bool = False) -> np.ndarray:
    """uint8 [side, side], dark ink on white paper, or white ink on black when `inverted`."""
    ink, _ = load_handwriting()
    columns = 2 if len(scene.layout) == 4 else 3
    picture = np.zeros((columns * CELL, columns * CELL), dtype=np.uint8)
    for cell, (glyph, (down, right)) in enumerate(zip(scene.glyphs, scene.offsets, strict=True)):
        if glyph != EMPTY:
            top, left = cell // columns * CELL + down, cell % columns * CELL + right
            picture[top : top + _GLYPH, left : left + _GLYPH] = ink[glyph]
    return picture if inverted else _PAPER - picture


def filled(layout: Sequence[int]) -> list[int]:
    """The cells that hold a digit."""
    return [cell for cell, digit in enumerate(layout) if digit != EMPTY]


class Studio:
    """Draws scenes of one split, with its handwriting only, into PNG files.

    Args:
        root: data folder; pictures go to `images/<split>/` below it.
    """

    def __init__(self, root: Path, *, split: Split, seed: int) -> None:
        self.root = root
        self.split = split
        # A stream for each split: the size of one does not change the scenes of another.
        self.rng = np.random.default_rng([seed, ("train", "validation", "test").index(split)])

    def draw(self, layouts: Sequence[Layout], *, name: str, inverted: bool = False) -> list[Scene]:
        """Each layout in new handwriting, its picture in `<name>_<number>.png`."""
        scenes = [compose(layout, split=self.split, rng=self.rng) for layout in layouts]
        return [
            replace(scene, image=self._save(draw(scene, inverted=inverted), f"{name}_{n:05d}"))
            for n, scene in enumerate(scenes)
        ]

    def crop(self, scene: Scene, *, cell: int) -> str:
        """Write one cell of a 2 x 2 scene, 28 x 28 pixels; the path of the crop."""
        top, left = cell // 2 * CELL, cell % 2 * CELL
        picture = draw(scene)[top : top + CELL, left : left + CELL]
        return self._save(picture, f"{Path(scene.image).stem}_crop{cell}")

    def shuffled(self, scenes: Sequence[Scene]) -> list[Scene]:
        return [scenes[number] for number in self.rng.permutation(len(scenes))]

    def _save(self, picture: np.ndarray, name: str) -> str:
        path = self.root / "images" / self.split / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, compress_level=1)
        return path.relative_to(self.root).as_posix()


# --- Questions: training and benchmark ask in the same words -------------------------------------

ANSWERS = (*DIGIT_WORDS, "nothing")


class Side(NamedTuple):
    """A text, and the path of an image below the data folder, `""` for none."""

    text: str
    image: str = ""


class Example(NamedTuple):
    """One row; a negative without text and image is none."""

    query: Side
    positive: Side
    negative: Side = Side("")


def find_caption(scene: Scene) -> Example:
    return Example(about(scene, "Find the caption of the image"), Side(caption(scene.layout)))


def find_image(scene: Scene) -> Example:
    return Example(Side(f"Find the image of {caption(scene.layout)}"), target(scene.image))


def find_edited(
    scene: Scene, by_layout: Mapping[Layout, Scene], rng: np.random.Generator
) -> Example | None:
    """Find the picture that one change to one cell leads to; the unchanged picture is the hard
    negative.

    None if no change leads to another one of these scenes.
    """
    before, reachable = scene.layout, []
    for cell, digit in product(range(len(before)), range(EMPTY, 10)):
        after = (*before[:cell], digit, *before[cell + 1 :])
        if after != before and after in by_layout:
            reachable.append((cell, digit, by_layout[after]))
    if not reachable:
        return None
    cell, digit, found = reachable[rng.integers(len(reachable))]
    if digit == EMPTY:
        words = f"Remove the {PLACES[cell]} digit"
    elif before[cell] == EMPTY:
        words = f"Add {DIGIT_WORDS[digit]} at the {PLACES[cell]}"
    else:
        words = f"Replace the {PLACES[cell]} digit by {DIGIT_WORDS[digit]}"
    return Example(about(scene, words), target(found.image), target(scene.image))


def name_digit(scene: Scene, rng: np.random.Generator) -> Example:
    cell = rng.choice(filled(scene.layout))
    answer = Side(DIGIT_WORDS[scene.layout[cell]])
    return Example(about(scene, f"Which digit is {PLACES[cell]}?"), answer)


def name_neighbour(
    scene: Scene, rng: np.random.Generator, *, held_out: bool = False
) -> Example | None:
    """Name the right neighbour of a digit that occurs once, or in a held-out pair only; None for a
    scene without one.
    """
    layout = scene.layout
    cells = [
        cell
        for cell in (0, 2)
        if layout[cell] != EMPTY
        and layout.count(layout[cell]) == 1
        and (not held_out or layout[cell : cell + 2] in HELD_OUT_PAIRS)
    ]
    if not cells:
        return None
    cell = rng.choice(cells)
    question = f"Which digit is right of {DIGIT_WORDS[layout[cell]]}?"
    return Example(about(scene, question), Side(ANSWERS[layout[cell + 1]]))  # EMPTY: the last one


def find_crop(scene: Scene, cell: int, crop: str, rng: np.random.Generator) -> Example:
    """Find the crop that a place, or a digit that occurs once, names."""
    digit = scene.layout[cell]
    by_digit = scene.layout.count(digit) == 1 and rng.random() < 0.5
    words = f"digit {DIGIT_WORDS[digit]}" if by_digit else f"{PLACES[cell]} digit"
    return Example(about(scene, f"Find the {words}"), target(crop))


def about(scene: Scene, words: str) -> Side:
    return Side(f"{PLACEHOLDER}\n{words}", scene.image)


def target(image: str) -> Side:
    return Side(f"{PLACEHOLDER}\nRepresent the image", image)
