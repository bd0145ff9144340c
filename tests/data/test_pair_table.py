"""Pairs in columns are the pairs that went in, for a fraction of the memory."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cocoa_pl.data import pair_table
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.pair_table import PairTable, has_images, select, subset_codes


def picture(name: str, text: str = "") -> Item:
    return Item(f"{IMAGE_SLOT}{text}", (Path("/data/images") / name,))


PAIRS = [
    Pair(picture("a.png"), Item("a cat"), (), "A", "A row 0"),
    Pair(Item("a cat"), picture("a.png", "\nRepresent"), (Item("a dog"),), "A", "A row 7"),
    Pair(Item("two"), Item("zwei"), (picture("b.png"), Item("drei")), "A", "A (other) row 1"),
    Pair(picture("b.png"), picture("a.png"), (), "B", "a file with blanks.jsonl line 3"),
    Pair(Item("a cat"), Item("é\n"), (Item("a cat"),), "A", "A row 8"),
]


def test_pairs_come_out_as_they_went_in() -> None:
    table = PairTable.of(PAIRS)
    assert len(table) == 5
    assert list(table) == PAIRS
    assert [table[row] for row in (-1, 3, 0)] == [PAIRS[row] for row in (-1, 3, 0)]
    with pytest.raises(IndexError):
        table[5]
    assert list(PairTable.of([])) == []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_any_size_hold_the_same_rows(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(pair_table, "_PART_ROWS", size)
    pairs = [PAIRS[0], *[PAIRS[1]] * 9, *PAIRS]
    table = PairTable.of(pairs)
    assert list(table) == [table[row] for row in range(len(pairs))] == pairs
    every_second = np.arange(0, len(pairs), 2)
    assert list(table.select(every_second)) == pairs[::2]
    assert has_images(table).tolist() == has_images(pairs).tolist()


def test_slices_selections_and_concatenations_are_tables_of_the_same_rows() -> None:
    table = PairTable.of(PAIRS)
    assert list(table[1:4]) == PAIRS[1:4]
    assert list(table[::-2][1:]) == PAIRS[::-2][1:]
    assert list(table.select(np.array([4, 0, 0]))) == [PAIRS[row] for row in (4, 0, 0)]
    joined = PairTable.concatenated([table[3:], PairTable.of([]), table[:2]])
    assert list(joined) == PAIRS[3:] + PAIRS[:2]
    assert list(pickle.loads(pickle.dumps(joined))) == list(joined)
    assert list(PairTable.concatenated([])) == []


def test_encoded_images_lie_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_table, "_PART_BYTES", 3000)
    images = [bytes([number]) * 1000 for number in (0, 1, 1, 2, 3, 0, 4)]
    pairs = [
        Pair(Item(IMAGE_SLOT, (image,)), PAIRS[1].positive, (), "A", f"A row {row}")
        for row, image in enumerate(images)
    ]
    table = PairTable.of(pairs)
    assert list(table) == [table[row] for row in range(7)] == pairs
    assert list(pickle.loads(pickle.dumps(table[2:]))) == pairs[2:]
    assert 6000 <= table.nbytes < 7000  # an equal one of the same part is kept once
    assert has_images(table).all()


def test_subsets_and_images_are_known_without_making_pairs() -> None:
    for pairs in (PairTable.of(PAIRS), PAIRS):
        names, codes = subset_codes(pairs)
        assert (names, codes.tolist()) == (["A", "B"], [0, 0, 0, 1, 0])
        expected = [[True, False], [False, True], [False, False], [True, True], [False, False]]
        assert has_images(pairs).tolist() == expected
        rows = select(pairs, np.array([3, 1]))
        assert list(rows) == [PAIRS[3], PAIRS[1]]
        names, codes = subset_codes(rows)
        assert (names, codes.tolist()) == (["B", "A"], [0, 1])


def rows(count: int) -> Iterator[Pair]:
    """As MMEB has them: long queries, each with an image of its own, and short answers."""
    prompt = f"{IMAGE_SLOT}\nRepresent the given image with the following question: "
    for number in range(count):
        query = Item(
            f"{prompt}what is number {number} of the things that are shown here?",
            (Path(f"/data/MMEB-train/images/A-OKVQA/Train/{number:012}.jpg"),),
        )
        yield Pair(query, Item(f"answer {number % 3000}"), (), "A-OKVQA", f"A-OKVQA row {number}")


def test_row_costs_a_few_dozen_bytes_beside_its_text() -> None:
    count = 10_000
    tracemalloc.start()
    table = PairTable.of(rows(count))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    text = sum(
        len(pair.query.text.encode()) + len(str(pair.query.media[0])) for pair in rows(count)
    )
    assert (table.nbytes - text) / count < 64
    assert kept / count < 64  # beside Arrow's buffers, which hold the text
    # As a list of objects, the same rows take more than a kilobyte each.
    assert len(pickle.dumps(table)) < 1.1 * table.nbytes
