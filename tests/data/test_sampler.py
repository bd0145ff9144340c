"""The rows of every step: the same whatever the ranks, the workers and the interruptions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.data.items import Item, Pair
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.sampler import Index, Mixing, StepSampler, draw_subsets, mix
from cocoa_pl.errors import UserError
from cocoa_pl.run import build_stages
from tests.configs import composed
from tests.data.loading import mixing

BY_NAME = {"big": 500, "middle": 160, "small": 48}
CODES = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [*BY_NAME.values()]))
PAIRS = Pairs.of(
    [Pair(Item("q"), Item("p"), (), [*BY_NAME][code], f"row {n}") for n, code in enumerate(CODES)]
)

ALL_ROWS = mixing()
COMPOSITIONS = {
    "shuffled": mixing(exponent=0.5),
    "one_subset": mixing(composition="one_subset"),
    "interleaved": mixing(composition="interleaved", sub_batches=4),
}


def batches(chosen: Mixing, stop: int, start: int = 0, **changes: Any) -> list[list[Index]]:
    values: dict[str, Any] = {"batch_size": 16, "seed": 0, "rank": 0, "world_size": 1}
    return list(StepSampler(PAIRS, chosen, steps=stop, start_step=start, **(values | changes)))


# --- All ways alike ----------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [ALL_ROWS, *COMPOSITIONS.values()])
@pytest.mark.parametrize("start", [1, 63, 65, 200])
def test_resumed_run_draws_what_was_left(chosen: Mixing, start: int) -> None:
    assert batches(chosen, 200, start) == batches(chosen, 200)[start:]


@pytest.mark.parametrize("chosen", [ALL_ROWS, *COMPOSITIONS.values()])
def test_ranks_share_every_batch_and_sub_batch(chosen: Mixing) -> None:
    whole = batches(chosen, 20, 3)
    for world_size in (2, 4):
        shares = [batches(chosen, 20, 3, rank=n, world_size=world_size) for n in range(world_size)]
        for batch, mine in zip(whole, zip(*shares, strict=True), strict=True):
            assert {len(rows) for rows in mine} == {16 // world_size}
            assert sorted(index for rows in mine for index in rows) == sorted(batch)
            if chosen.composition != "shuffled":
                assert len({tuple(sorted(subsets_of(rows))) for rows in mine}) == 1


@pytest.mark.parametrize("chosen", [ALL_ROWS, *COMPOSITIONS.values()])
def test_seeds_have_orders_of_their_own(chosen: Mixing) -> None:
    assert batches(chosen, 20) == batches(chosen, 20) != batches(chosen, 20, seed=1)


def test_epoch_shows_a_row_at_most_once_and_leaves_out_less_than_a_batch() -> None:
    steps = batches(ALL_ROWS, 88)
    assert all(len(step) == 16 for step in steps)
    rows = [[row for step in steps for e, row in step if e == epoch] for epoch in (0, 1)]
    assert [len(set(one)) for one in rows] == [len(one) for one in rows] == [704, 704]
    assert rows[0] != rows[1]
    assert max(rows[0]) < len(PAIRS) == 708


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


@pytest.mark.parametrize(("name", "size"), [("one_subset", 16), ("interleaved", 4)])
def test_sub_batches_are_equal_runs_of_one_subset_each(name: str, size: int) -> None:
    found = batches(COMPOSITIONS[name], 100)
    runs = [subsets_of(batch)[i : i + size] for batch in found for i in range(0, 16, size)]
    assert all(len(set(run)) == 1 for run in runs)
    assert {run[0] for run in runs} == {0, 1, 2}
    assert any(len(set(subsets_of(batch))) > 1 for batch in found) == (size < 16)


@pytest.mark.parametrize("chosen", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_row_is_used_again_only_after_all_of_its_subset(chosen: Mixing) -> None:
    found = [index for batch in batches(chosen, 300) for index in batch]
    for code, size in enumerate(BY_NAME.values()):
        mine = [index for index in found if CODES[index[1]] == code]
        assert len(mine) > 2 * size
        for start in range(0, len(mine) - size, size):
            epoch = mine[start : start + size]
            assert len({row for _, row in epoch}) == size
            assert {number for number, _ in epoch} == {start // size}


@pytest.mark.parametrize("chosen", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_batch_shows_no_row_twice_even_between_epochs(chosen: Mixing) -> None:
    for batch in batches(chosen, 600):
        assert len({row for _, row in batch}) == len(batch) == 16


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
        ({"weights": {"huge": 1}}, 16, "names huge, but the stage's data has .*middle"),
        ({"weights": dict.fromkeys(BY_NAME, 0)}, 16, "are all 0"),
        ({"composition": "interleaved", "sub_batches": 3}, 16, "cannot be cut into 3 equal"),
        ({"composition": "one_subset"}, 64, r"small has 48 rows, fewer than one sub-batch of 64"),
        ({}, 709, "has 708 rows, fewer than one batch of 709; lower"),
    ],
)
def test_mixing_that_does_not_fit_the_data_is_refused(
    changes: Any, batch_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        batches(mixing(**changes), 0, batch_size=batch_size)


def test_mix_folds_any_integers_into_63_bits() -> None:
    # The first output of SplitMix64 seeded with 0 is 0xE220A8397B1DCDAF (its reference code).
    assert mix(0) == 0xE220A8397B1DCDAF >> 1
    values = [mix(), mix(0), mix(0, 0), mix(1), mix(-1), mix(2**63), mix(1, 2), mix(2, 1)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)
