"""Batches of a DataModule: roles, workers, resuming, and rows that cannot be read."""

import math
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from cocoa_pl.data.batch import Batch, Sample
from cocoa_pl.data.datamodule import LARGE, RowSamples, StageData, validation_batches
from cocoa_pl.data.examples import BridgeExamples, PairExamples
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


@pytest.fixture(scope="module", params=[Path("/no/such/picture.png"), b"broken"], ids=type)
def pairs_with_a_bad_row(pairs: list[Pair], request: pytest.FixtureRequest) -> list[Pair]:
    gone = Item(IMAGE_SLOT, (request.param,))
    bad = Pair(gone, pairs[BAD].positive, (), "toy", f"toy row {BAD}")
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


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert (one.row_ids, one.noise) == (other.row_ids, other.noise)
        for name in ("input_ids", "patches", "targets", "token_rows", "patch_rows", "keys"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert torch.equal(one.plan.cu_seqlens_k, other.plan.cu_seqlens_k)


# --- Rows ------------------------------------------------------------------------------------


def contrast(pairs: list[Pair], processor: Processor, **changes: Any) -> StageData:
    examples = PairExamples(max_negatives=2)
    return bridge_data(pairs, processor, make_samples=examples, masking=None, **changes)


def test_collated_rows_lie_role_by_role(pairs: list[Pair], processor: Processor) -> None:
    data = contrast(pairs, processor)
    rows = [data.make_row(pairs[row], 0) for row in (2, 0, 1, 5)]
    (batch,) = data.collator(rows)
    assert batch.num_rows == 4
    order = batch.places.argsort()
    assert names(batch) == [*(2, 0, 1, 5), *(2, 0, 1, 5), *(2, 1, 5), *(2, 5)]
    assert batch.roles[order].tolist() == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2
    expected = [
        *[pairs[row].query.key for row in (2, 0, 1, 5)],
        *[pairs[row].positive.key for row in (2, 0, 1, 5)],
        *[pairs[row].negatives[0].key for row in (2, 1, 5)],
        *[pairs[row].negatives[1].key for row in (2, 5)],
    ]
    assert batch.keys[order].tolist() == expected


def test_masks_follow_from_seed_epoch_and_row(pairs: list[Pair], processor: Processor) -> None:
    def hidden(epoch: int, row: int, seed: int = 0) -> tuple[int, ...]:
        data = bridge_data([pairs[0]] * 2, processor, seed=seed)
        sample = samples(RowSamples([pairs[0]] * 2, data.make_row, seed)[epoch, row])[0]
        return (*sample.hidden.tolist(), *sample.hidden_visual.tolist(), sample.noise_seed)

    seen = [hidden(0, 0), hidden(1, 0), hidden(0, 1), hidden(-1, 0), hidden(0, 0, seed=1)]
    assert len(set(seen)) == len(seen)
    assert hidden(1, 0) == seen[1]


def samples(row: list[Sample] | str) -> list[Sample]:
    assert isinstance(row, list)
    return row


# --- Loading ---------------------------------------------------------------------------------


def test_batches_do_not_depend_on_the_number_of_workers(
    pairs: list[Pair], processor: Processor
) -> None:
    alone = bridge_data(pairs, processor)
    shared = bridge_data(pairs, processor, num_workers=2)
    assert_same(loaded(alone.train_dataloader()), loaded(shared.train_dataloader()))
    assert_same(validation(alone), validation(shared))


@pytest.mark.parametrize("start", [1, 2, 5])
def test_resumed_run_loads_the_batches_that_were_left(
    start: int, pairs: list[Pair], processor: Processor
) -> None:
    whole = loaded(bridge_data(pairs, processor).train_dataloader())
    resumed = loaded(bridge_data(pairs, processor, start_step=start).train_dataloader())
    assert_same(resumed, whole[start:])


def test_training_batches_have_the_batch_size_and_no_row_twice(
    pairs: list[Pair], processor: Processor
) -> None:
    batches = loaded(bridge_data(pairs, processor).train_dataloader())
    assert len(batches) == 6
    for batch in batches:
        assert batch.num_rows == batch.num_samples == len(set(batch.row_ids)) == 4


def test_validation_shows_every_row_once_in_order_and_always_alike(
    pairs: list[Pair], processor: Processor
) -> None:
    data = bridge_data(pairs, processor)
    first = validation(data)
    assert [batch.num_rows for batch in first] == [3, 2, 2]  # at most 3 each, about equal
    assert [row for batch in first for row in names(batch)] == list(range(7))
    assert_same(validation(data), first)


def test_no_validation_rows_means_no_loader(pairs: list[Pair], processor: Processor) -> None:
    data = bridge_data(pairs, processor)
    data.validation = []
    assert data.val_dataloader() == []


def test_dataset_smaller_than_a_batch_is_refused(pairs: list[Pair], processor: Processor) -> None:
    with pytest.raises(UserError, match="has 11 rows, fewer than one batch of 12"):
        bridge_data(pairs, processor, batch_size=12).train_dataloader()


# --- Bad rows --------------------------------------------------------------------------------


def load_epoch(pairs: list[Pair], processor: Processor, **changes: Any) -> list[Batch]:
    data = contrast(pairs, processor, batch_size=11, steps=1, **changes)
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
def test_skipped_row_is_logged_and_leaves_no_trace_in_the_batch(
    num_workers: int,
    pairs_with_a_bad_row: list[Pair],
    processor: Processor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (batch,) = load_epoch(
        pairs_with_a_bad_row, processor, on_bad_row="skip", num_workers=num_workers
    )
    assert batch.num_rows == 10
    assert f"toy row {BAD}" not in batch.row_ids
    wrong = "(image /no/such/picture.png does not exist|the encoded image .* cannot be read)"
    if not num_workers:  # a worker's log is its own
        assert re.search(f"skipped 1 bad rows, first: toy row {BAD}: {wrong}", caplog.text)


def test_batch_without_a_readable_row_is_refused(
    pairs_with_a_bad_row: list[Pair], processor: Processor
) -> None:
    data = contrast(pairs_with_a_bad_row, processor, on_bad_row="skip")
    rows = [data.make_row(pairs_with_a_bad_row[BAD], seed) for seed in (0, 1)]
    with pytest.raises(UserError, match="no row of this batch can be read, first: toy row 5: "):
        data.collator(rows)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_waiting_batches_hold_few_files_open(pairs: list[Pair], processor: Processor) -> None:
    """torch would hold one open for each of hundreds of tensors."""
    data = contrast(pairs, processor, num_workers=2, steps=40)
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = loaded(data.train_dataloader())
    assert max(batch.patches.nbytes for batch in kept) < LARGE
    assert len(list(Path("/proc/self/fd").iterdir())) - before < len(kept)


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
