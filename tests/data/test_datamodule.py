"""Batches of a DataModule: roles, workers, resuming, and rows that cannot be read."""

import math
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from cocoa_pl.data.batch import Batch
from cocoa_pl.data.datamodule import LARGE, StageData, validation_batches
from cocoa_pl.data.examples import BridgeExamples
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.masking import Masking
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.processor import Processor
from cocoa_pl.errors import UserError
from tests.data.loading import stage_data

MakeItem = Callable[..., Item]
BAD = 5
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


@pytest.fixture(scope="module")
def pairs_with_a_bad_row(pairs: list[Pair]) -> list[Pair]:
    bad = Pair(Item(IMAGE_SLOT, (b"broken",)), pairs[BAD].positive, (), "toy", f"toy row {BAD}")
    return [*pairs[:BAD], bad, *pairs[BAD + 1 :]]


def loaded(loader: Any) -> list[Batch]:
    """One batch a step: the budget is large."""
    steps = list(loader)
    assert all(len(step) == 1 for step in steps)
    return [batch for step in steps for batch in step]


def bridge_data(pairs: list[Pair], processor: Processor, **changes: Any) -> StageData:
    values: dict[str, Any] = {
        "make_samples": BRIDGE,
        "masking": Masking(0.7, "target", 0.5, processor.mask_id),
    }
    rows = Pairs.of(pairs)
    return stage_data(rows, rows[:7], processor, **(values | changes))


def validation(data: StageData) -> list[Batch]:
    return loaded(data.val_dataloader())


def names(batch: Batch) -> list[int]:
    """Numbers of the rows in the order of the step."""
    numbers = [int(row_id.removeprefix("toy row ")) for row_id in batch.row_ids]
    return [numbers[place] for place in batch.places.argsort().tolist()]


# --- Loading ---------------------------------------------------------------------------------


def test_batch_that_ranks_cannot_share_is_refused(
    pairs: list[Pair], processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocoa_pl.data.datamodule.world_size", lambda: 3)
    with pytest.raises(UserError, match="a batch of 4 cannot be shared by 3 ranks"):
        bridge_data(pairs, processor).train_dataloader()


def test_validation_shows_every_row_once_in_order_and_always_alike(
    pairs: list[Pair], processor: Processor
) -> None:
    data = bridge_data(pairs, processor)
    first = validation(data)
    assert [batch.num_rows for batch in first] == [3, 2, 2]  # at most 3 each, about equal
    assert [row for batch in first for row in names(batch)] == list(range(7))
    for one, again in zip(first, validation(data), strict=True):
        assert (one.row_ids, one.noise) == (again.row_ids, again.noise)
        for name in ("input_ids", "targets", "token_rows", "patch_rows"):
            assert torch.equal(getattr(one, name), getattr(again, name)), name
    data.validation = []
    assert data.val_dataloader() == []


# --- Bad rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_row_stops_the_run_or_leaves_no_trace_in_the_batch(
    num_workers: int,
    pairs_with_a_bad_row: list[Pair],
    processor: Processor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load(on_bad_row: str) -> list[Batch]:
        data = bridge_data(
            pairs_with_a_bad_row,
            processor,
            make_samples=BridgeExamples(sources={"query": 1.0, "self": 0.0}),
            on_bad_row=on_bad_row,
            num_workers=num_workers,
            batch_size=11,
            steps=1,
        )
        return loaded(data.train_dataloader())

    message = r"toy row 5: the encoded image \(6 bytes\) cannot be read as an image"
    with pytest.raises(UserError, match=message):
        load("fail")
    (batch,) = load("skip")
    assert batch.num_rows == 10
    assert f"toy row {BAD}" not in batch.row_ids
    if not num_workers:  # a worker's log is its own
        assert re.search(f"skipped 1 bad rows, first: {message}", caplog.text)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_waiting_batches_hold_few_files_open(pairs: list[Pair], processor: Processor) -> None:
    """torch would hold one open for each of hundreds of tensors."""
    data = bridge_data(pairs, processor, num_workers=2, steps=40)
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = loaded(data.train_dataloader())
    assert max(batch.patches.nbytes for batch in kept) < LARGE
    assert len(list(Path("/proc/self/fd").iterdir())) - before < len(kept)


@pytest.mark.parametrize("num_rows", [5, 8, 100])
@pytest.mark.parametrize("size", [1, 6, 1000])
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
