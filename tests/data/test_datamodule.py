"""Rows to packed batches: roles, workers, resuming, and rows that cannot be read."""

import math
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoa_pl.batch import Batch, Encoded, Rows
from cocoa_pl.data.datamodule import EncodedRows, StageData, collate, validation_batches
from cocoa_pl.data.examples import BridgeExamples, PairExamples
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.sampler import Mixing
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.errors import UserError

MakeItem = Callable[..., Item]
BAD = 5
SHUFFLED = Mixing(composition="shuffled", sub_batches=None, exponent=1.0, weights=None)
BRIDGE = BridgeExamples(sources={"query": 0.5, "self": 0.5})


@pytest.fixture(scope="module")
def pairs(make_item: MakeItem) -> list[Pair]:
    """Every third row has hard negatives: one, or two."""
    return [
        Pair(
            make_item(row, images=1),
            make_item(100 + row),
            tuple(make_item(200 + 10 * row + n) for n in range(row % 3)),
            "toy",
            f"toy row {row}",
        )
        for row in range(11)
    ]


@pytest.fixture(scope="module", params=[Path("/no/such/picture.png"), b"broken"], ids=type)
def pairs_with_a_bad_row(pairs: list[Pair], request: pytest.FixtureRequest) -> list[Pair]:
    gone = Item(IMAGE_SLOT, (request.param,))
    bad = Pair(gone, pairs[BAD].positive, (), "toy", f"toy row {BAD}")
    return [*pairs[:BAD], bad, *pairs[BAD + 1 :]]


def as_they_are(rows: Rows) -> Rows:
    """What a stage would make of rows."""
    return rows


def loaded(loader: Any) -> list[Rows]:
    return [parcel.content for parcel in loader]


def stage_data(pairs: list[Pair], processor: Processor, **changes: Any) -> StageData:
    values: dict[str, Any] = {
        "make_samples": BRIDGE,
        "mixing": SHUFFLED,
        "batch_size": 4,
        "validation_batch_size": 3,
        "steps": 6,
        "start_step": 0,
        "seed": 0,
        "num_workers": 0,
        "on_bad_row": "fail",
        "pinned": False,
        **changes,
    }
    values |= dict.fromkeys(("prepare", "prepare_validation"), as_they_are)
    return StageData(pairs, pairs[:7], processor=processor, **values)


def validation(data: StageData) -> list[Rows]:
    return loaded(data.val_dataloader())


def content(batch: Batch) -> tuple[tuple[str, ...], list[int], list[int], Tensor]:
    return batch.row_ids, batch.seeds.tolist(), batch.input_ids.tolist(), batch.patches


def assert_same(first: list[Rows], second: list[Rows]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        *facts, patches = content(one.batch)
        *other_facts, other_patches = content(other.batch)
        assert facts == other_facts
        assert torch.equal(patches, other_patches)
        assert one.skipped == other.skipped


# --- Collating -------------------------------------------------------------------------------


def test_collated_rows_lie_role_by_role(pairs: list[Pair], processor: Processor) -> None:
    rows = EncodedRows(pairs, PairExamples(max_negatives=2), processor, seed=0, on_bad_row="fail")
    collated = collate([rows[0, row] for row in (2, 0, 1, 5)])
    assert collated.num_rows == 4
    names = [name.removeprefix("toy row ") for name in collated.batch.row_ids]
    assert "".join(names) == "2015" + "2015" + "215" + "25"  # queries, positives, negatives
    expected = [
        *[pairs[row].query.key for row in (2, 0, 1, 5)],
        *[pairs[row].positive.key for row in (2, 0, 1, 5)],
        *[pairs[row].negatives[0].key for row in (2, 1, 5)],
        *[pairs[row].negatives[1].key for row in (2, 5)],
    ]
    assert collated.batch.keys.tolist() == expected


def test_samples_of_a_run_have_seeds_of_their_own(pairs: list[Pair], processor: Processor) -> None:
    rows = EncodedRows(pairs, PairExamples(max_negatives=2), processor, seed=0, on_bad_row="fail")
    seeds = [
        sample.seed
        for epoch in (-1, 0, 1)
        for row in range(len(pairs))
        for sample in encoded(rows[epoch, row])
    ]
    assert len(seeds) == len(set(seeds))
    other = EncodedRows(pairs, PairExamples(max_negatives=2), processor, seed=1, on_bad_row="fail")
    assert encoded(other[0, 0])[0].seed not in seeds


def encoded(row: list[Encoded] | str) -> list[Encoded]:
    assert isinstance(row, list)
    return row


# --- Loading ---------------------------------------------------------------------------------


def test_batches_do_not_depend_on_the_number_of_workers(
    pairs: list[Pair], processor: Processor
) -> None:
    alone = stage_data(pairs, processor)
    shared = stage_data(pairs, processor, num_workers=2)
    assert_same(loaded(alone.train_dataloader()), loaded(shared.train_dataloader()))
    assert_same(validation(alone), validation(shared))


@pytest.mark.parametrize("start", [1, 2, 5])
def test_resumed_run_loads_the_batches_that_were_left(
    start: int, pairs: list[Pair], processor: Processor
) -> None:
    whole = loaded(stage_data(pairs, processor).train_dataloader())
    resumed = loaded(stage_data(pairs, processor, start_step=start).train_dataloader())
    assert_same(resumed, whole[start:])


def test_training_batches_have_the_batch_size_and_no_row_twice(
    pairs: list[Pair], processor: Processor
) -> None:
    batches = loaded(stage_data(pairs, processor).train_dataloader())
    assert len(batches) == 6
    for rows in batches:
        assert rows.num_rows == rows.batch.num_samples == len(set(rows.batch.row_ids)) == 4


def test_validation_shows_every_row_once_in_order_and_always_alike(
    pairs: list[Pair], processor: Processor
) -> None:
    data = stage_data(pairs, processor)
    first = validation(data)
    assert [r.num_rows for r in first] == [3, 2, 2]  # at most 3 each, of about equal size
    names = [name for rows in first for name in rows.batch.row_ids]
    assert names == [f"toy row {row}" for row in range(7)]
    assert_same(validation(data), first)


def test_no_validation_rows_means_no_loader(pairs: list[Pair], processor: Processor) -> None:
    data = stage_data(pairs, processor)
    data.validation_rows.pairs = []
    assert data.val_dataloader() == []


def test_dataset_smaller_than_a_batch_is_refused(pairs: list[Pair], processor: Processor) -> None:
    with pytest.raises(UserError, match="has 11 rows, fewer than one batch of 12"):
        stage_data(pairs, processor, batch_size=12).train_dataloader()


# --- Bad rows --------------------------------------------------------------------------------


def load_epoch(pairs: list[Pair], processor: Processor, **changes: Any) -> list[Rows]:
    data = stage_data(
        pairs,
        processor,
        batch_size=11,
        steps=1,
        make_samples=PairExamples(max_negatives=0),
        **changes,
    )
    return loaded(data.train_dataloader())


def test_bad_row_stops_the_run_and_is_named(
    pairs_with_a_bad_row: list[Pair], processor: Processor
) -> None:
    with pytest.raises(UserError) as caught:
        load_epoch(pairs_with_a_bad_row, processor)
    assert str(caught.value) in (
        "toy row 5: image /no/such/picture.png does not exist; check the path and the image root",
        "toy row 5: the encoded image (6 bytes) cannot be read as an image (its content is in no "
        "known format); replace it or drop the row",
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skipped_row_is_counted_and_leaves_no_trace_in_the_batch(
    num_workers: int, pairs_with_a_bad_row: list[Pair], processor: Processor
) -> None:
    (rows,) = load_epoch(
        pairs_with_a_bad_row, processor, on_bad_row="skip", num_workers=num_workers
    )
    assert rows.num_rows == 10
    assert rows.batch.num_samples == 20
    assert f"toy row {BAD}" not in rows.batch.row_ids
    (reason,) = rows.skipped
    wrong = "(image /no/such/picture.png does not exist|the encoded image .* cannot be read)"
    assert re.match(f"toy row {BAD}: {wrong}", reason)


def test_batch_without_a_readable_row_is_refused(
    pairs_with_a_bad_row: list[Pair], processor: Processor
) -> None:
    rows = EncodedRows(
        pairs_with_a_bad_row, PairExamples(max_negatives=0), processor, seed=0, on_bad_row="skip"
    )
    with pytest.raises(UserError, match="no row of this batch can be read, first: toy row 5: "):
        collate([rows[0, BAD], rows[1, BAD]])


@pytest.mark.parametrize("num_rows", [4, 5, 8, 13, 100])
@pytest.mark.parametrize("size", [1, 4, 6, 1000])
def test_validation_batches_share_every_row_once_and_leave_no_rank_out(
    num_rows: int, size: int
) -> None:
    def of(world_size: int) -> list[list[list[int]]]:
        """Rows of each rank, batch by batch."""
        return [
            [
                [row for _, row in batch]
                for batch in validation_batches(
                    num_rows, global_batch_size=size, rank=rank, world_size=world_size
                )
            ]
            for rank in range(world_size)
        ]

    for world_size in (1, 2, 4):
        ranks = of(world_size)
        assert len({len(batches) for batches in ranks}) == 1
        assert all(batch for batches in ranks for batch in batches)
        whole = [sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
        assert list(chain.from_iterable(whole)) == list(range(num_rows))
        if num_rows // math.ceil(num_rows / size) >= world_size:  # every rank has rows anyway
            assert whole == of(1)[0]
            assert max(map(len, whole)) <= size


def test_fewer_validation_rows_than_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="the validation data has 3 rows for 4 ranks"):
        validation_batches(3, global_batch_size=8, rank=0, world_size=4)
