"""Streamed pairs: every row once an epoch, in shares, shuffled, and resumed to the row."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cocoa_pl.data import datamodule
from cocoa_pl.data.batch import Batch
from cocoa_pl.data.datamodule import Places, StageData, Streamed, check_mixing
from cocoa_pl.data.examples import PairExamples
from cocoa_pl.data.items import Pair
from cocoa_pl.data.masking import Masking
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sources import PairSource
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import Loaded
from tests.data.loading import mixing, stage_data
from tests.files import write_rows
from tests.stages.lab import Lab, equal, weights_of

MakeStream = Callable[..., PairSource]
A_ROWS, B_ROWS = 23, 17


def reader(
    stream: Any, name: str = "A", *, lane: int = 0, lanes: int = 1, seed: int = 0, place: Any = None
) -> Iterator[Any]:
    assert isinstance(stream, PairStream)
    return stream.pairs(name, {} if place is None else place, lane, lanes, seed)


def texts(rows: Iterator[Pair], count: int) -> list[str]:
    return [next(rows).positive.text for _ in range(count)]


# --- Order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 3])
def test_lanes_together_read_every_row_once_an_epoch(make_stream: MakeStream, lanes: int) -> None:
    stream = make_stream().train_pairs()
    epochs: list[list[str]] = [[], []]
    for lane in range(lanes):
        place = {}
        for pair in reader(stream, lane=lane, lanes=lanes, place=place):
            if place["epoch"] > 1:
                break
            epochs[place["epoch"]].append(pair.positive.text)
    everything = sorted(f"A {number}" for number in range(A_ROWS))
    assert [sorted(epoch) for epoch in epochs] == [everything] * 2


def test_rows_are_shuffled_by_windows_anew_in_every_epoch_and_by_seed(
    make_stream: MakeStream,
) -> None:
    stream = make_stream(window=100).train_pairs()
    whole = texts(reader(stream), 2 * A_ROWS)
    orders = [whole[:A_ROWS], whole[A_ROWS:], texts(reader(stream, seed=1), A_ROWS)]
    in_order = [f"A {number}" for number in range(A_ROWS)]
    assert len({tuple(order) for order in (*orders, in_order)}) == 4
    assert texts(reader(stream), A_ROWS) == orders[0]
    found = [int(text[2:]) for text in texts(reader(make_stream(window=1).train_pairs()), A_ROWS)]
    breaks = sum(second != first + 1 for first, second in pairwise(found))
    assert 0 < breaks <= 5  # six row groups


@pytest.mark.parametrize(("lanes", "window"), [(1, 4), (4, 100), (5, 1)])
def test_a_lane_goes_on_with_the_very_next_row(
    make_stream: MakeStream, lanes: int, window: int
) -> None:
    stream = make_stream(window=window).train_pairs()
    place = {}
    whole = reader(stream, lane=lanes - 1, lanes=lanes, place=place)
    places, found = [], []
    for _ in range(2 * A_ROWS):
        places.append(json.loads(json.dumps(place)))  # plain values only
        found.append(next(whole).positive.text)
    for start in range(0, len(found), 3):
        resumed = reader(stream, lane=lanes - 1, lanes=lanes, place=deepcopy(places[start]))
        assert texts(resumed, min(8, len(found) - start)) == found[start : start + 8]


# --- Rows ------------------------------------------------------------------------------------


def test_rows_with_files_and_rows_with_embedded_images_become_pairs(
    make_stream: MakeStream, hub_folder: Path
) -> None:
    stream = make_stream(subsets=["A", "E"]).train_pairs()
    one, other = next(reader(stream)), next(reader(stream, "E"))
    number = one.positive.text.removeprefix("A ")
    assert one.query.media == (hub_folder / f"images/A{number}.png",)
    assert one.row_id.startswith("A (streamed, reader 1/1, epoch 0) row ")
    assert other.query.media[0].startswith(b"\x89PNG")


def test_lines_of_json_are_streamed(tmp_path: Path, make_stream: MakeStream) -> None:
    lines = ['{"query": "a", "positive": "b"}', "{", '{"query": "c", "positive": "d"}']
    (tmp_path / "A.jsonl").write_text("\n".join(lines))
    columns = [{"query": {"text": "query"}, "positive": {"text": "positive"}, "required": []}]
    options = {
        "files": "{subset}.jsonl",
        "subsets": ["A"],
        "columns": columns,
        "on_bad_row": "skip",
    }
    rows = reader(make_stream(path=str(tmp_path), **options).train_pairs())
    found = [next(rows) for _ in range(6)]
    assert Counter(row.positive.text for row in found if isinstance(row, Pair)) == {"b": 2, "d": 2}
    assert [row.kind for row in found if isinstance(row, UserError)] == ["bad_row"] * 2


def test_stage_takes_the_first_rows_of_the_subsets_it_can_use(make_stream: MakeStream) -> None:
    stream = make_stream().train_pairs().describing(["A"])
    assert isinstance(stream, PairStream)
    assert list(stream.subsets) == ["A"]
    few = stream.first_of_each_subset(7)
    assert sorted(texts(reader(few), 7)) == [f"A {number}" for number in range(7)]
    shares = [texts(reader(few, lane=lane, lanes=2), 4 - lane) for lane in (0, 1)]
    assert sorted(shares[0] + shares[1]) == [f"A {number}" for number in range(7)]
    with pytest.raises(UserError, match="none of the subsets"):
        make_stream().train_pairs().describing(["C"])


def test_generative_stage_passes_over_rows_of_two_images(
    make_stream: MakeStream, tmp_path: Path
) -> None:
    image = {"pos_text": "<|image_1|>", "pos_image_path": "images/A1.png"}
    row = {"qry": "<|image_1|>", "qry_image_path": "images/A0.png"}
    caption = {"pos_text": "a caption", "pos_image_path": ""}
    write_rows(tmp_path / "A/original-0.parquet", [row | image, row | caption])
    stream = make_stream(path=str(tmp_path), subsets=["A"]).train_pairs()
    assert texts(reader(stream.describing(None)), 3) == ["a caption"] * 3
    assert len(set(texts(reader(stream), 2))) == 2


def test_first_rows_are_held_out_and_never_trained_on(make_stream: MakeStream) -> None:
    source = make_stream(validation_rows=5)
    held_out = [pair.positive.text for pair in source.validation_pairs()]
    assert held_out == [f"{subset} {number}" for subset in "AB" for number in range(5)]
    for lanes in (1, 2):
        seen = texts(reader(source.train_pairs(), lanes=lanes), 3 * A_ROWS)
        assert not set(seen) & set(held_out)
    assert len(set(texts(reader(source.train_pairs()), A_ROWS - 5))) == A_ROWS - 5
    (a, b) = source.validation_subsets()
    assert (a.name, len(a.row_ids), b.name, len(b.row_ids)) == ("A", 5, "B", 5)
    assert source.training_texts()
    assert list(make_stream().validation_pairs()) == make_stream().validation_subsets() == []


# --- Refusals --------------------------------------------------------------------------------


def test_a_lane_without_rows_is_refused(make_stream: MakeStream) -> None:
    for source, lanes in ((make_stream(), 30), (make_stream(validation_rows=A_ROWS), 1)):
        with pytest.raises(
            UserError, match=rf"A \(streamed, reader {lanes}/{lanes}, .*: no row to train on"
        ):
            next(reader(source.train_pairs(), lane=lanes - 1, lanes=lanes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": ["A", "C"]}, r"C: cannot stream C/original-\*\.parquet of .*hf download"),
        ({"path": "nobody/nothing"}, r"A: cannot stream .* of nobody/nothing .*hf download nobody"),
        ({"split": "train"}, "A: A/train-.* the columns qry and qry_image_path and .* are needed"),
        ({"rows": {"C": 1}}, r"data\.rows names C"),
        ({"rows": {"A": 23}}, "must name every subset"),
        ({"subsets": [], "caption_subsets": []}, r"data\.subsets is empty"),
    ],
)
def test_what_cannot_be_streamed_is_named(
    make_stream: MakeStream, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_stream(**changes).train_pairs()


def test_a_stream_that_breaks_off_is_no_bad_row(
    make_stream: MakeStream, hub_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(hub_folder, tmp_path, dirs_exist_ok=True)
    rows = reader(make_stream(path=str(tmp_path)).train_pairs())
    texts(rows, 4)
    shutil.rmtree(tmp_path / "A")
    with pytest.raises(UserError, match=r"A .*: the stream broke off \(.*; resume=RUN goes on"):
        texts(rows, A_ROWS)


# --- Batches ---------------------------------------------------------------------------------


SHUFFLED = mixing()
INTERLEAVED = mixing(composition="interleaved", sub_batches=2)


def streamed_data(source: PairSource, processor: Processor, **changes: Any) -> StageData:
    values: dict[str, Any] = {
        "make_samples": PairExamples(max_negatives=0),
        "masking": Masking(0.5, "context", 0.0, processor.mask_id),
        "mixing": INTERLEAVED,
        "steps": 12,
    }
    rows = source.train_pairs(), source.validation_pairs()
    return stage_data(*rows, processor, **(values | changes))


def loaded(data: StageData) -> list[list[Batch]]:
    return [streamed.batch for streamed in data.train_dataloader()]


def row_ids(step: list[Batch]) -> list[str]:
    """Of the queries of a step, in their order."""
    (batch,) = step
    order = batch.places.argsort()
    return [batch.row_ids[place] for place in order[batch.roles[order] == 0].tolist()]


def subsets_of(step: list[Batch]) -> list[str]:
    return [name[0] for name in row_ids(step)]


def content(step: list[Batch]) -> tuple[list[str], list[int], list[int]]:
    """Rows, what is in them, and what is hidden of it."""
    (batch,) = step
    return row_ids(step), batch.keys.tolist(), batch.input_ids.tolist()


def test_each_of_two_ranks_reads_its_own_rows_and_resumes_where_it_stood(
    make_stream: MakeStream, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(rank: int, start_step: int = 0, places: Places | None = None) -> list[Streamed]:
        monkeypatch.setattr(datamodule, "rank", lambda: rank)
        monkeypatch.setattr(datamodule, "world_size", lambda: 2)
        data = streamed_data(make_stream(), processor, steps=10, start_step=start_step)
        data.load_state_dict({"lanes_of_ranks": [[places or {}]] * 2})
        return list(data.train_dataloader())

    shares = [batches(0), batches(1)]
    drawn = INTERLEAVED.subsets({"A": 1, "B": 1}, batch_size=4, steps=10, seed=0)
    for mine, others, (first, _, second, _) in zip(*shares, drawn.tolist(), strict=True):
        expected = ["AB"[first], "AB"[second]]
        assert subsets_of(mine.batch) == subsets_of(others.batch) == expected
    # Within an epoch; the next one deals row groups out anew.
    seen = [{key for one in share[:8] for key in content(one.batch)[1]} for share in shares]
    assert not seen[0] & seen[1]
    for rank, whole in enumerate(shares):
        resumed = batches(rank, 4, whole[3].places)
        assert [content(one.batch) for one in resumed] == [content(one.batch) for one in whole[4:]]


def test_bad_row_stops_the_run_or_leaves_the_batch(
    make_stream: MakeStream, processor: Processor, tmp_path: Path
) -> None:
    """Images that are not below the root are missing: all rows of A and B, none of E."""
    source = make_stream(image_root=str(tmp_path), subsets=["A", "E"])
    with pytest.raises(UserError, match=r"A \(streamed, .*\.png does not exist"):
        list(streamed_data(source, processor, mixing=SHUFFLED).train_dataloader())
    source = make_stream(image_root=str(tmp_path), subsets=["A", "E"], on_bad_row="skip")
    skipping = streamed_data(
        source, processor, mixing=SHUFFLED, batch_size=16, steps=2, on_bad_row="skip"
    )
    for step in loaded(skipping):
        assert set(subsets_of(step)) == {"E"}
        assert 0 < len(subsets_of(step)) < 14


# --- Resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_interrupted_run_trains_on_the_same_rows_as_a_whole_one(
    make_stream: MakeStream,
    processor: Processor,
    load_tiny: Callable[..., Loaded],
    tmp_path: Path,
    num_workers: int,
) -> None:
    """The loader reads ahead (two batches a worker, and Lightning one): that must not count."""
    source = make_stream(subsets=["A", "B", "E"], validation_rows=3)
    lab = Lab(source, processor, load_tiny)
    words = ("stage.order=[contrast]", "mixing@stage.contrast.mixing=interleaved")
    stages = lab.stages(*words, "stage.contrast.mixing.sub_batches=2", steps=9)
    found = []
    for caps in ([9], [3, 9]):
        for cap in caps:
            backbone, folder = lab.fresh(), tmp_path / f"{caps[0]}"
            options = {"num_workers": num_workers, "resume": folder.exists()}
            lab.train(folder, stages, backbone, trainer=[f"+trainer.max_steps={cap}"], **options)
        found.append(weights_of(backbone))
    assert equal(*found)


def test_other_numbers_of_workers_or_ranks_are_refused(
    make_stream: MakeStream, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = streamed_data(make_stream(), processor, num_workers=2).state_dict()
    streamed_data(make_stream(), processor, num_workers=2).load_state_dict(state)
    with pytest.raises(
        UserError, match=r"1 ranks x 2 workers and cannot go on with 1 x 1; .* num_workers=2"
    ):
        streamed_data(make_stream(), processor, num_workers=1).load_state_dict(state)
    monkeypatch.setattr(datamodule, "world_size", lambda: 4)
    with pytest.raises(UserError, match="with 4 x 2"):
        streamed_data(make_stream(), processor, num_workers=2).load_state_dict(state)


def test_mixing_that_does_not_fit_is_refused(make_stream: MakeStream) -> None:
    stream = make_stream().train_pairs()
    check_mixing(stream, INTERLEAVED, batch_size=4)
    message = "mixing.weights names C, but the stage's data has A, B"
    with pytest.raises(UserError, match=message):
        check_mixing(stream, mixing(weights={"C": 1}), batch_size=4)
