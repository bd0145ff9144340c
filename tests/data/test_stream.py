"""Streamed rows: every one once an epoch, in shares, shuffled, and resumable to the row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cocoa_pl.data.examples import describing, first_of_each_subset
from cocoa_pl.data.items import Pair
from cocoa_pl.data.stream import PairStream, StreamData
from cocoa_pl.data.stream_reader import SubsetReader
from cocoa_pl.errors import UserError

MakeStream = Callable[..., StreamData]
A_ROWS, B_ROWS, E_ROWS = 23, 17, 12


def reader(stream: PairStream, subset: int = 0, **changes: Any) -> SubsetReader:
    values: dict[str, Any] = {"reader": 0, "readers": 1, "seed": 0, "state": None}
    return SubsetReader(stream, subset, **(values | changes))


def take(source: SubsetReader) -> Pair:
    pair = source.take()
    assert isinstance(pair, Pair)
    return pair


def texts(source: SubsetReader, count: int) -> list[str]:
    return [take(source).positive.text for _ in range(count)]


# --- Order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 2, 3, 6])
def test_readers_together_see_every_row_once_an_epoch(
    make_stream: MakeStream, readers: int
) -> None:
    stream = make_stream().train_pairs()
    epochs: list[list[str]] = [[], []]
    for number in range(readers):
        one = reader(stream, reader=number, readers=readers)
        while True:
            text = take(one).positive.text
            if one.state["epoch"] > 1:
                break
            epochs[one.state["epoch"]].append(text)
    everything = sorted(f"A {number}" for number in range(A_ROWS))
    assert [sorted(epoch) for epoch in epochs] == [everything] * 2


def test_rows_are_shuffled_anew_in_every_epoch_and_by_seed(make_stream: MakeStream) -> None:
    stream = make_stream(window=100).train_pairs()
    whole = texts(reader(stream), 2 * A_ROWS)
    orders = [whole[:A_ROWS], whole[A_ROWS:], texts(reader(stream, seed=1), A_ROWS)]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != [f"A {number}" for number in range(A_ROWS)]
    assert texts(reader(stream), A_ROWS) == orders[0]


def test_window_bounds_what_is_shuffled(make_stream: MakeStream) -> None:
    """With a window of one row, only the order of row groups changes."""
    found = [int(text[2:]) for text in texts(reader(make_stream(window=1).train_pairs()), A_ROWS)]
    breaks = sum(second != first + 1 for first, second in pairwise(found))
    assert 0 < breaks <= 5  # six row groups


@pytest.mark.parametrize(("readers", "window"), [(1, 4), (2, 3), (4, 100), (5, 1)])
def test_reader_goes_on_with_the_very_next_row(
    make_stream: MakeStream, readers: int, window: int
) -> None:
    stream = make_stream(window=window).train_pairs()
    whole = reader(stream, reader=readers - 1, readers=readers)
    states, found = [], []
    for _ in range(2 * A_ROWS):
        states.append(json.loads(json.dumps(whole.state)))  # plain values only
        found.append(take(whole).positive.text)
    for start in range(0, len(found), 3):
        resumed = reader(stream, reader=readers - 1, readers=readers, state=states[start])
        assert texts(resumed, min(8, len(found) - start)) == found[start : start + 8]


# --- Rows ------------------------------------------------------------------------------------


def test_rows_with_files_and_rows_with_embedded_images_become_pairs(
    make_stream: MakeStream, hub_folder: Path
) -> None:
    stream = make_stream(subsets=["A", "E"]).train_pairs()
    one, other = take(reader(stream, 0)), take(reader(stream, 1))
    number = one.positive.text.removeprefix("A ")
    assert one.query.media == (hub_folder / f"images/A{number}.png",)
    assert one.subset == "A"
    assert one.row_id.startswith("A (streamed, reader 1/1, window 0) row ")
    (image,) = other.query.media
    assert isinstance(image, bytes)
    assert image.startswith(b"\x89PNG")


def test_nulls_are_absent_and_bad_rows_are_named_and_passed(
    make_stream: MakeStream, tmp_path: Path
) -> None:
    good = {"qry": "a", "qry_image_path": None, "pos_text": "b", "pos_image_path": None}
    table = pa.Table.from_pylist([good | {"pos_text": None}, good])
    (tmp_path / "A").mkdir()
    pq.write_table(table, tmp_path / "A" / "original-0.parquet")
    stream = make_stream(path=str(tmp_path), subsets=["A"]).train_pairs()
    one = reader(stream)
    found = [one.take() for _ in range(4)]
    bad = [row.partition("window 0) ")[2] for row in found if isinstance(row, str)]
    assert bad == ["row 0: the positive is empty: it has neither text nor an image"] * 2
    assert [row.positive.text for row in found if isinstance(row, Pair)] == ["b"] * 2


def test_stage_takes_the_first_rows_of_the_subsets_it_can_use(make_stream: MakeStream) -> None:
    stream = describing(make_stream().train_pairs(), ["A"])
    assert isinstance(stream, PairStream)
    assert stream.names == ("A",)
    few = first_of_each_subset(stream, 7)
    assert isinstance(few, PairStream)
    assert sorted(texts(reader(few), 7)) == [f"A {number}" for number in range(7)]
    assert sorted(texts(reader(few, readers=2), 8)) == sorted([f"A {n}" for n in (0, 2, 4, 6)] * 2)
    assert first_of_each_subset(stream, None) == stream
    with pytest.raises(UserError, match="none of the subsets"):
        describing(make_stream().train_pairs(), ["C"])


def test_generative_stage_passes_over_rows_of_two_images(
    make_stream: MakeStream, tmp_path: Path, hub_folder: Path
) -> None:
    image = {"pos_text": "<|image_1|>", "pos_image_path": "images/A1.png"}
    row = {"qry": "<|image_1|>", "qry_image_path": "images/A0.png"}
    caption = {"pos_text": "a caption", "pos_image_path": ""}
    (tmp_path / "A").mkdir()
    pq.write_table(
        pa.Table.from_pylist([row | image, row | caption]), tmp_path / "A/original-0.parquet"
    )
    stream = make_stream(path=str(tmp_path), subsets=["A"]).train_pairs()
    assert texts(reader(stream.describing(None)), 3) == ["a caption"] * 3
    assert len(set(texts(reader(stream), 2))) == 2


# --- Validation ------------------------------------------------------------------------------


def test_first_rows_are_held_out_and_never_trained_on(make_stream: MakeStream) -> None:
    source = make_stream(validation_rows=5)
    held_out = [pair.positive.text for pair in source.validation_pairs()]
    assert held_out == [f"{subset} {number}" for subset in "AB" for number in range(5)]
    for readers in (1, 2):
        seen = texts(reader(source.train_pairs(), readers=readers), 3 * A_ROWS)
        assert not set(seen) & set(held_out)
    assert len(set(texts(reader(source.train_pairs()), A_ROWS - 5))) == A_ROWS - 5
    (a, b) = source.validation_subsets()
    assert (a.name, len(a.row_ids), b.name, len(b.row_ids)) == ("A", 5, "B", 5)
    assert source.training_texts()


def test_no_validation_rows_means_none(make_stream: MakeStream) -> None:
    assert make_stream().validation_pairs() == []
    assert make_stream().validation_subsets() == []


def test_subset_that_is_held_out_whole_is_refused(make_stream: MakeStream) -> None:
    stream = make_stream(subsets=["A"], validation_rows=A_ROWS).train_pairs()
    with pytest.raises(UserError, match="found no row for training in a whole epoch"):
        reader(stream).take()


# --- Refusals --------------------------------------------------------------------------------


def test_reader_without_rows_is_refused(make_stream: MakeStream) -> None:
    stream = make_stream().train_pairs()
    with pytest.raises(UserError, match=r"A: reader 30 of 30 \(ranks x workers\) gets no rows"):
        reader(stream, reader=29, readers=30).take()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": ["A", "C"]}, r"C: cannot stream C/original-\*\.parquet of .*hf download"),
        ({"path": "nobody/nothing"}, r"A: cannot stream .* of nobody/nothing .*hf download nobody"),
        ({"split": "train"}, "no column qry, qry_image_path, pos_text, pos_image_path"),
    ],
)
def test_what_cannot_be_streamed_is_named(
    make_stream: MakeStream, changes: dict[str, Any], message: str
) -> None:
    stream = make_stream(**changes).train_pairs()
    with pytest.raises(UserError, match=message):
        _ = stream.opened


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_subsets": ["C"]}, r"data\.caption_subsets names C"),
        ({"rows": {"C": 1}}, r"data\.rows names C"),
        ({"rows": {"A": 23}}, "must name every subset"),
        ({"subsets": [], "caption_subsets": []}, r"data\.subsets is empty"),
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore'"),
    ],
)
def test_impossible_source_is_refused(
    make_stream: MakeStream, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_stream(**changes)


def test_known_sizes_are_what_mixing_takes(make_stream: MakeStream) -> None:
    assert make_stream().train_pairs().sizes.tolist() == [1, 1]
    known = make_stream(rows={"B": B_ROWS, "A": A_ROWS}).train_pairs()
    assert known.sizes.tolist() == [A_ROWS, B_ROWS]


@pytest.mark.parametrize("error", [OSError("connection reset"), pa.ArrowInvalid("truncated")])
def test_stream_that_breaks_off_is_no_bad_row(
    make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken() -> Iterator[pa.Table]:
        raise error
        yield

    one = reader(make_stream().train_pairs())
    texts(one, 4)
    monkeypatch.setattr(one, "_windows", broken())
    with pytest.raises(UserError, match=rf"A: the stream broke off \({error}\); resume=RUN"):
        one.take()
