"""The rows of every step: the same whatever the ranks, the workers and the interruptions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.data.items import Item, Pair
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.sampler import (
    AllRows,
    Index,
    MixedSubsets,
    Mixing,
    StepSampler,
    draw_subsets,
    make_order,
    mix,
)
from cocoa_pl.errors import UserError
from cocoa_pl.run import build_stages
from tests.configs import composed
from tests.data.loading import mixing

NAMES = ["big", "middle", "small"]
SIZES = np.array([500, 160, 48])
BY_NAME = dict(zip(NAMES, SIZES.tolist(), strict=True))
CODES = np.repeat(np.arange(3), SIZES)[np.random.default_rng(0).permutation(SIZES.sum())]


COMPOSITIONS = {
    "shuffled": mixing(exponent=0.5),
    "one_subset": mixing(composition="one_subset"),
    "interleaved": mixing(composition="interleaved", sub_batches=4),
}


def order(chosen: Mixing, *, batch_size: int = 16, seed: int = 0) -> MixedSubsets:
    return MixedSubsets(NAMES, CODES, chosen, batch_size=batch_size, seed=seed)


def batches(chosen: Mixing, start: int, stop: int, **options: Any) -> list[list[Index]]:
    return [list(batch) for batch in order(chosen, **options).batches(start, stop)]


# --- All rows ----------------------------------------------------------------------------------


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


def test_epoch_shows_a_row_at_most_once_and_leaves_out_less_than_a_batch() -> None:
    steps = steps_of(steps=9)
    for step in steps:
        assert len(step) == len(set(step)) == 6
        assert all(0 <= row < 23 for _, row in step)
    for epoch in range(3):
        rows = [row for step in steps for e, row in step if e == epoch]
        assert len(rows) == len(set(rows)) == 18


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    steps = steps_of(num_rows=24, steps=8)
    orders = [[row for step in steps[i : i + 4] for _, row in step] for i in (0, 4)]
    orders.append([row for step in steps_of(num_rows=24, steps=4, seed=1) for _, row in step])
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != list(range(24))


@pytest.mark.parametrize("start", [1, 4, 10])
def test_resumed_run_draws_what_the_whole_run_would_have_drawn(start: int) -> None:
    assert steps_of(start_step=start) == steps_of()[start:]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_partition_the_global_batch(world_size: int) -> None:
    shares = [steps_of(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(steps_of()):
        mine = [share[step] for share in shares]
        assert {len(rows) for rows in mine} == {6 // world_size}
        assert sorted(index for rows in mine for index in rows) == sorted(whole)


def test_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="a batch of 6 cannot be shared by 4 ranks"):
        steps_of(world_size=4)


# --- Shares ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [500, 160, 48]),
        ({"exponent": 0.0}, [1, 1, 1]),
        ({"exponent": 0.5}, np.sqrt([500, 160, 48])),
        ({"weights": {"small": 4, "middle": 0}}, [500, 0, 192]),
        ({"weights": {"big": 0.5}, "exponent": 0.0}, [0.5, 1, 1]),
    ],
)
def test_share_is_weight_times_a_power_of_the_size(changes: Any, expected: Any) -> None:
    shares = mixing(**changes).shares(BY_NAME)
    np.testing.assert_allclose(shares, np.asarray(expected) / np.sum(expected))


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_1024_sub_batches_keep_the_shares_to_one_draw(exponent: float) -> None:
    shares = mixing(exponent=exponent, weights={"small": 0.37}).shares(BY_NAME)
    drawn = draw_subsets(shares, count=40 * 1024, seed=3).reshape(40, 1024)
    counts = np.stack([np.bincount(cycle, minlength=3) for cycle in drawn])
    assert (np.abs(counts - 1024 * shares) < 1).all()
    # Rounded up and down at random, so the mean is nearer than any single cycle's rounding.
    assert (np.abs(counts.mean(axis=0) - 1024 * shares) < 0.25).all()


def test_a_tiny_share_is_drawn_now_and_then_and_a_share_of_zero_never() -> None:
    drawn = draw_subsets(np.array([1 - 1e-4, 1e-4, 0]), count=500 * 1024, seed=0)
    assert 25 < (drawn == 1).sum() < 80  # 51 expected
    assert drawn.max() == 1


# --- Batches ---------------------------------------------------------------------------------


def subsets_of(batch: list[Index]) -> list[int]:
    return [int(CODES[row]) for _, row in batch]


def test_batch_of_one_subset() -> None:
    found = batches(COMPOSITIONS["one_subset"], 0, 100)
    assert all(len(set(subsets_of(batch))) == 1 for batch in found)
    assert {subsets_of(batch)[0] for batch in found} == {0, 1, 2}


def test_interleaved_batch_has_equal_runs_of_one_subset_each() -> None:
    found = batches(COMPOSITIONS["interleaved"], 0, 100)
    runs = [subsets_of(batch)[i : i + 4] for batch in found for i in (0, 4, 8, 12)]
    assert all(len(set(run)) == 1 for run in runs)
    assert any(len(set(subsets_of(batch))) > 1 for batch in found)


@pytest.mark.parametrize("chosen", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_row_is_used_again_only_after_all_of_its_subset(chosen: Mixing) -> None:
    found = [index for batch in batches(chosen, 0, 300) for index in batch]
    for code, size in enumerate(SIZES):
        mine = [index for index in found if CODES[index[1]] == code]
        assert len(mine) > 2 * size
        for start in range(0, len(mine) - size, size):
            epoch = mine[start : start + size]
            assert len({row for _, row in epoch}) == size
            assert {number for number, _ in epoch} == {start // size}


@pytest.mark.parametrize("chosen", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_batch_shows_no_row_twice_even_between_epochs(chosen: Mixing) -> None:
    for batch in batches(chosen, 0, 600):
        assert len({row for _, row in batch}) == len(batch) == 16


@pytest.mark.parametrize("chosen", COMPOSITIONS.values(), ids=COMPOSITIONS)
@pytest.mark.parametrize("start", [63, 65])
def test_resumed_run_draws_what_was_left(chosen: Mixing, start: int) -> None:
    assert batches(chosen, start, 200) == batches(chosen, 0, 200)[start:]


@pytest.mark.parametrize("name", ["one_subset", "interleaved"])
def test_ranks_share_every_sub_batch(name: str) -> None:
    shares = [
        StepSampler(order(COMPOSITIONS[name]), steps=20, start_step=3, rank=rank, world_size=4)
        for rank in range(4)
    ]
    for mine in zip(*shares, strict=True):
        assert len({tuple(sorted(subsets_of(rows))) for rows in mine}) == 1


def test_every_composition_is_a_config_that_any_stage_can_choose() -> None:
    assert {path.stem for path in (CONFIGS / "mixing").glob("*.yaml")} == set(COMPOSITIONS)
    for composition, rows in (("shuffled", 1), ("one_subset", 64), ("interleaved", 32)):
        cfg = composed(f"mixing@stage.warmup.mixing={composition}")
        chosen = {stage.name: stage.mixing for stage in build_stages(cfg)}
        assert chosen["warmup"].composition == composition
        assert chosen["warmup"].sub_batch_rows(64) == rows
        assert chosen["contrast"].by_rows  # the released scripts' way stays the default


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"composition": "interleaved"}, {"sub_batches": 2}])
def test_sub_batches_are_for_interleaved_batches(changes: Any) -> None:
    with pytest.raises(UserError, match="sub_batches is for composition=interleaved, and needed"):
        mixing(**changes)


@pytest.mark.parametrize(
    ("changes", "batch_size", "message"),
    [
        ({"exponent": 1e6}, 16, "mixing.exponent or mixing.weights are too large"),
        ({"weights": {"huge": 1}}, 16, "names huge, but the stage's data has big, middle, small"),
        ({"weights": dict.fromkeys(NAMES, 0)}, 16, "are all 0"),
        ({"composition": "interleaved", "sub_batches": 3}, 16, "cannot be cut into 3 equal"),
        ({"composition": "one_subset"}, 64, r"small has 48 rows, fewer than one sub-batch of 64"),
    ],
)
def test_mixing_that_does_not_fit_the_data_is_refused(
    changes: Any, batch_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        order(mixing(**changes), batch_size=batch_size)


def test_data_smaller_than_a_batch_are_refused() -> None:
    pairs = Pairs.of([Pair(Item(f"q{n}"), Item("p"), (), "a", f"a row {n}") for n in range(5)])
    assert isinstance(make_order(pairs, mixing(), batch_size=5, seed=0), AllRows)
    mixed = mixing(composition="one_subset")
    assert isinstance(make_order(pairs, mixed, batch_size=5, seed=0), MixedSubsets)
    with pytest.raises(UserError, match=r"has 5 rows, fewer than one batch of 6; lower"):
        make_order(pairs, mixing(), batch_size=6, seed=0)


def test_mix_folds_any_integers_into_63_bits() -> None:
    # The first output of SplitMix64 seeded with 0 is 0xE220A8397B1DCDAF (its reference code).
    assert mix(0) == 0xE220A8397B1DCDAF >> 1
    values = [mix(), mix(0), mix(0, 0), mix(1), mix(-1), mix(2**63), mix(1, 2), mix(2, 1)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)
