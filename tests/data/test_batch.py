"""Packing samples, cutting them into pieces, and lending contexts."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.data.batch import (
    Batch,
    Collator,
    PlanBatch,
    Sample,
    cut_by_cost,
    with_context_of,
)
from cocoa_pl.data.masking import Masking
from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import Loaded

IMAGES = (1, 0, 2, 0, 1)
HALF = Masking(text_ratio=0.5, text_segment="target", patch_ratio=0.5, mask_token_id=323)
MakeSamples = Callable[..., list[Sample]]
Packed = Callable[..., Batch]


@pytest.fixture
def samples(make_samples: MakeSamples) -> list[Sample]:
    """With hidden tokens and visual tokens."""
    rng = np.random.default_rng(0)
    return [HALF(sample, rng) for sample in make_samples(IMAGES, targets=True)]


def joined(samples: Sequence[Sample], name: str) -> list[int]:
    return [value for sample in samples for value in getattr(sample, name).tolist()]


def test_samples_and_their_rows_are_packed_end_to_end_in_their_order(
    samples: list[Sample], packed: Packed
) -> None:
    batch = packed(samples)
    assert batch.input_ids.tolist() == joined(samples, "input_ids")
    assert batch.patches.dtype == torch.uint8
    assert batch.keys.tolist() == [s.key for s in samples]
    assert batch.row_ids == tuple(s.row_id for s in samples)
    assert batch.places.tolist() == list(range(len(samples)))
    start, first_visual = 0, 0
    rows: dict[str, list[int]] = {name: [] for name in ("token_rows", "patch_rows", "patch_places")}
    for sample in samples:
        visual = np.flatnonzero(sample.kinds == 2)
        rows["token_rows"] += (start + sample.hidden - 1).tolist()
        rows["patch_rows"] += (start + visual[sample.hidden_visual]).tolist()
        rows["patch_places"] += (first_visual + sample.hidden_visual).tolist()
        start, first_visual = start + sample.num_tokens, first_visual + len(visual)
    assert {name: getattr(batch, name).tolist() for name in rows} == rows
    assert all(rows.values())
    assert batch.targets.tolist() == joined(samples, "targets")
    assert len(batch.patches) == 4 * len(batch.visual_rows) == 4 * first_visual
    assert (batch.num_samples, batch.num_tokens) == (5, start)


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([4, 4, 4, 4], 9, [[0, 1], [2, 3]]),
        ([4, 4, 4, 4], 8, [[0, 1], [2, 3]]),
        ([4, 4, 4, 4], 7, [[0], [1], [2], [3]]),
        ([2, 20, 2, 2], 8, [[1], [0, 2, 3]]),
        ([2, 3, 20, 5], 8, [[2], [3, 1], [0]]),
        ([3], 2, [[0]]),
    ],
)
def test_pieces_hold_the_most_expensive_first_and_never_exceed_the_token_budget(
    lengths: list[int], budget: int, expected: list[list[int]]
) -> None:
    pieces = cut_by_cost(np.array(lengths), np.array(lengths), budget)
    assert [piece.tolist() for piece in pieces] == expected


def test_an_image_costs_more_than_a_text_of_as_many_tokens(
    sample_of: Callable[..., Sample],
) -> None:
    assert sample_of(9, visual=8).cost > sample_of(10).cost == 11


def test_what_a_step_does_not_read_stays_on_the_host(samples: list[Sample], packed: Packed) -> None:
    moved = packed(samples).to(torch.device("meta"))
    on_host = {"segment_lengths", "grids", "keys", "pools", "roles", "places"}
    for field in dataclasses.fields(Batch):
        value = getattr(moved, field.name)
        if isinstance(value, Tensor):
            assert value.device.type == ("cpu" if field.name in on_host else "meta"), field.name
    plans = (moved.plan, moved.vision["plan"])
    assert {plan.cu_seqlens_q.device.type for plan in plans} == {"meta"}


# --- Rows of a step ---------------------------------------------------------------------------


@pytest.fixture
def plan(loaded: Loaded, policies: dict[str, Policy]) -> PlanBatch:
    return loaded.backbone.planner(policies["eos_bridge"])


@pytest.fixture
def rows(samples: list[Sample]) -> list[list[Sample]]:
    """One with a hard negative, and one without."""
    with_roles = [dataclasses.replace(samples[n], role=r) for n, r in enumerate((0, 1, 2, 0, 1))]
    return [with_roles[:3], with_roles[3:]]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_step_holds_each_sample_once_at_its_place_by_role(
    budget: int, rows: list[list[Sample]], plan: PlanBatch
) -> None:
    batches = Collator(plan, token_budget=budget)(rows)
    assert all(batch.num_tokens <= budget or batch.num_samples == 1 for batch in batches)
    order = torch.cat([batch.places for batch in batches]).argsort()
    keys, roles = (torch.cat([getattr(b, n) for b in batches])[order] for n in ("keys", "roles"))
    assert roles.tolist() == [0, 0, 1, 1, 2]
    by_role = [rows[0][0], rows[1][0], rows[0][1], rows[1][1], rows[0][2]]
    assert keys.tolist() == [sample.key for sample in by_role]
    assert sum(batch.num_rows for batch in batches) == 2


def test_bad_rows_are_left_out_and_nothing_but_bad_rows_is_refused(
    rows: list[list[Sample]], plan: PlanBatch, caplog: pytest.LogCaptureFixture
) -> None:
    collate = Collator(plan, token_budget=1000)
    gone = [UserError("gone", row_id=row_id) for row_id in ("row 3", "row 5")]
    (batch,) = collate([gone[0], rows[0], gone[1]])
    assert batch.num_samples == 3
    assert "skipped 2 bad rows, first: row 3: gone" in caplog.text
    with pytest.raises(UserError, match="no row of this batch can be read, first: row 3: gone"):
        collate(gone)


def test_exchanged_samples_keep_their_text_behind_another_context(samples: list[Sample]) -> None:
    for sample, donor in ((samples[0], samples[2]), (samples[2], samples[1])):
        found = with_context_of(sample, donor)
        own, lent = sample.segment_lengths[0], donor.segment_lengths[0]
        assert found.segment_lengths == (lent, *sample.segment_lengths[1:])
        for name in ("input_ids", "kinds"):
            expected = [*getattr(donor, name)[:lent], *getattr(sample, name)[own:]]
            assert getattr(found, name).tolist() == expected
        assert np.array_equal(found.position_ids[:, :lent], donor.position_ids[:, :lent])
        distance = found.position_ids[0, lent:] - donor.position_ids[0, lent]
        assert np.array_equal(distance, sample.position_ids[0, own:] - sample.position_ids[0, own])
        assert (found.position_ids[:, lent:] == found.position_ids[0, lent:]).all()
        assert (found.hidden - lent).tolist() == (sample.hidden - own).tolist()
        assert found.targets.tolist() == sample.targets.tolist()
        for name in ("patches", "grids", "hidden_visual", "noise_seed", "key", "row_id"):
            giver = sample if name in ("key", "row_id") else donor
            assert getattr(found, name) is getattr(giver, name)


def test_every_sample_is_exchanged_once_unless_it_is_alone(
    rows: list[list[Sample]], plan: PlanBatch
) -> None:
    collate = Collator(plan, token_budget=1000, exchange=True)
    own, exchanged = collate(rows)
    assert (own.exchanged, exchanged.exchanged) == (False, True)
    assert sorted(own.keys.tolist()) == sorted(exchanged.keys.tolist())
    assert sorted(own.targets.tolist()) == sorted(exchanged.targets.tolist())
    assert sorted(own.segment_lengths[:, 0].tolist()) == sorted(
        exchanged.segment_lengths[:, 0].tolist()
    )
    assert [batch.exchanged for batch in collate([rows[0][:1]])] == [False]
