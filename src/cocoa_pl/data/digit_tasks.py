"""Scenes in, questions with answers and candidates out: the tasks of the embedded data set.

Every prompt is written here once, so that training and benchmark ask in the same words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cocoa_pl.data.items import PLACEHOLDER
from cocoa_pl.data.scenes import (
    DIGIT_WORDS,
    EMPTY,
    HELD_OUT_PAIRS,
    PLACES,
    Scene,
    caption,
    edit,
    filled,
    only_occurrence,
)

NOTHING = "nothing"
_LEFT_CELLS = (0, 2)
_GROUNDING_CANDIDATES = 100


class Side(NamedTuple):
    """Text and image path (relative to the image root), `""` for none."""

    text: str
    image: str


class Example(NamedTuple):
    """One row; `negative` is a hard negative, or `ABSENT`."""

    query: Side
    positive: Side
    negative: Side


ABSENT = Side("", "")


@dataclass(frozen=True)
class Drawn:
    """A scene and the path of its picture."""

    scene: Scene
    image: str


@dataclass(frozen=True)
class Task:
    """Rows, and the candidates among which each row's positive is to be found.

    Attributes:
        candidates: int arrays, one for each row: positions in `pool`, the positive first.
    """

    name: str
    examples: list[Example]
    pool: list[Side]
    candidates: list[np.ndarray]


def image_to_text(scenes: Sequence[Drawn]) -> list[Example]:
    """Find the caption of a picture."""
    return [
        Example(
            _with_image("Find the caption of the image", drawn),
            Side(caption(drawn.scene.layout), ""),
            ABSENT,
        )
        for drawn in scenes
    ]


def text_to_image(scenes: Sequence[Drawn]) -> list[Example]:
    """Find the picture of a caption."""
    return [
        Example(
            Side(f"Find the image of {caption(drawn.scene.layout)}", ""),
            target(drawn.image),
            ABSENT,
        )
        for drawn in scenes
    ]


def image_to_image(scenes: Sequence[Drawn], others: Sequence[Drawn]) -> list[Example]:
    """Find the same layout in other handwriting."""
    return [
        Example(
            _with_image("Find the same digits in other handwriting", drawn),
            target(other.image),
            ABSENT,
        )
        for drawn, other in zip(scenes, others, strict=True)
    ]


def edited_image(
    scenes: Sequence[Drawn], *, among: Sequence[Drawn], rng: np.random.Generator
) -> list[Example]:
    """Find the picture that an edit leads to; the unedited picture is the hard negative.

    Scenes from which no single edit leads to another one of `among` are left out.
    """
    by_layout = {drawn.scene.layout: drawn for drawn in among}
    examples = []
    for drawn in scenes:
        before = drawn.scene.layout
        reachable = [layout for layout in _neighbours(before) if layout in by_layout]
        if reachable:
            after = reachable[rng.integers(len(reachable))]
            examples.append(
                Example(
                    _with_image(str(edit(before, after)), drawn),
                    target(by_layout[after].image),
                    target(drawn.image),
                )
            )
    return examples


def position(scenes: Sequence[Drawn], *, rng: np.random.Generator) -> list[Example]:
    """Name the digit at a place."""
    examples = []
    for drawn in scenes:
        cell = rng.choice(filled(drawn.scene.layout))
        examples.append(
            _answer(f"Which digit is {PLACES[cell]}?", drawn, DIGIT_WORDS[drawn.scene.layout[cell]])
        )
    return examples


def count(scenes: Sequence[Drawn]) -> list[Example]:
    """Say how many digits there are."""
    return [
        _answer("How many digits are there?", drawn, DIGIT_WORDS[len(filled(drawn.scene.layout))])
        for drawn in scenes
    ]


def right_of(
    scenes: Sequence[Drawn], *, rng: np.random.Generator, only_held_out: bool = False
) -> list[Example]:
    """Name the right neighbour of a digit that occurs once; scenes without one are left out."""
    examples = []
    for drawn in scenes:
        layout = drawn.scene.layout
        cells = [
            cell
            for cell in _LEFT_CELLS
            if only_occurrence(layout, layout[cell])
            and (not only_held_out or layout[cell : cell + 2] in HELD_OUT_PAIRS)
        ]
        if cells:
            cell = rng.choice(cells)
            right = layout[cell + 1]
            question = f"Which digit is right of {DIGIT_WORDS[layout[cell]]}?"
            examples.append(
                _answer(question, drawn, NOTHING if right == EMPTY else DIGIT_WORDS[right])
            )
    return examples


def cells_to_find(scenes: Sequence[Drawn], *, rng: np.random.Generator) -> list[int]:
    """The cell that each scene's grounding question asks for."""
    return [int(rng.choice(filled(drawn.scene.layout))) for drawn in scenes]


def grounding(
    scenes: Sequence[Drawn],
    cells: Sequence[int],
    crops: Sequence[Mapping[int, str]],
    *,
    rng: np.random.Generator,
) -> list[Example]:
    """Find the crop that a place or a digit names; `crops` maps each scene's cells to paths."""
    examples = []
    for drawn, cell, paths in zip(scenes, cells, crops, strict=True):
        digit = drawn.scene.layout[cell]
        by_digit = only_occurrence(drawn.scene.layout, digit) and rng.random() < 0.5
        words = f"digit {DIGIT_WORDS[digit]}" if by_digit else f"{PLACES[cell]} digit"
        examples.append(
            Example(_with_image(f"Find the {words}", drawn), target(paths[cell]), ABSENT)
        )
    return examples


def target(image: str) -> Side:
    """A picture to be found."""
    return Side(f"{PLACEHOLDER}\nRepresent the image", image)


def answers() -> list[Side]:
    """All answers to questions."""
    return [Side(word, "") for word in (*DIGIT_WORDS, NOTHING)]


def digit_names() -> list[Side]:
    """All digits by name."""
    return [Side(word, "") for word in DIGIT_WORDS]


def against_pool(examples: Sequence[Example], pool: list[Side]) -> list[np.ndarray]:
    """For each example all of the pool, the positive first."""
    number = {side: index for index, side in enumerate(pool)}
    everything = np.arange(len(pool))
    rows = []
    for example in examples:
        positive = number[example.positive]
        rows.append(np.concatenate([[positive], np.delete(everything, positive)]))
    return rows


def against_crops(
    scenes: Sequence[Drawn], cells: Sequence[int], crops: Sequence[Mapping[int, str]]
) -> tuple[list[Side], list[np.ndarray]]:
    """Crops as pool; for each example its own, those of the same scene, then of the next scenes.

    A crop with the positive's own piece of handwriting is never its rival.
    """
    places = [(row, cell) for row, paths in enumerate(crops) for cell in paths]
    glyphs = np.array([scenes[row].scene.glyphs[cell] for row, cell in places])
    number = {place: index for index, place in enumerate(places)}
    start_of = np.searchsorted([row for row, _ in places], np.arange(len(scenes)))
    candidates = []
    for row, cell in enumerate(cells):
        positive = number[row, cell]
        order = np.roll(np.arange(len(places)), -start_of[row])
        rivals = order[glyphs[order] != glyphs[positive]]
        candidates.append(np.concatenate([[positive], rivals[: _GROUNDING_CANDIDATES - 1]]))
    return [target(crops[row][cell]) for row, cell in places], candidates


def _with_image(words: str, drawn: Drawn) -> Side:
    return Side(f"{PLACEHOLDER}\n{words}", drawn.image)


def _answer(question: str, drawn: Drawn, answer: str) -> Example:
    return Example(_with_image(question, drawn), Side(answer, ""), ABSENT)


def _neighbours(layout: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All layouts that differ in one cell."""
    return [
        (*layout[:cell], digit, *layout[cell + 1 :])
        for cell in range(len(layout))
        for digit in range(EMPTY, 10)
        if digit != layout[cell]
    ]
