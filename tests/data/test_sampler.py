"""The rows of every step: the same whatever the ranks, the workers and the interruptions."""

import pytest

from cocoa_pl.data.sampler import AllRows, Index, StepSampler
from cocoa_pl.errors import UserError


def steps_of(
    *,
    num_rows: int = 23,
    batch: int = 6,
    steps: int = 10,
    start_step: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[Index]]:
    order = AllRows(num_rows, batch_size=batch, seed=seed)
    return list(
        StepSampler(order, steps=steps, start_step=start_step, rank=rank, world_size=world_size)
    )


def test_every_step_has_whole_batches_without_duplicates() -> None:
    for step in steps_of():
        assert len(step) == len(set(step)) == 6
        assert len({epoch for epoch, _ in step}) == 1
        assert all(0 <= row < 23 for _, row in step)


def test_epoch_shows_a_row_at_most_once_and_leaves_out_less_than_a_batch() -> None:
    steps = steps_of(steps=9)
    for epoch in range(3):
        rows = [row for step in steps for e, row in step if e == epoch]
        assert len(rows) == len(set(rows)) == 18


def test_dataset_of_whole_batches_is_shown_completely() -> None:
    steps = steps_of(num_rows=24, steps=4)
    assert sorted(row for step in steps for _, row in step) == list(range(24))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    steps = steps_of(num_rows=24, steps=8)
    orders = [[row for step in steps[i : i + 4] for _, row in step] for i in (0, 4)]
    orders.append([row for step in steps_of(num_rows=24, steps=4, seed=1) for _, row in step])
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != list(range(24))


@pytest.mark.parametrize("start", [1, 2, 3, 4, 7, 9, 10])
def test_resumed_run_draws_what_the_whole_run_would_have_drawn(start: int) -> None:
    assert steps_of(start_step=start) == steps_of()[start:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_partition_the_global_batch(world_size: int) -> None:
    shares = [steps_of(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(steps_of()):
        mine = [share[step] for share in shares]
        assert {len(rows) for rows in mine} == {6 // world_size}
        assert sorted(index for rows in mine for index in rows) == sorted(whole)


def test_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="a batch of 6 cannot be shared by 4 ranks"):
        steps_of(world_size=4)
