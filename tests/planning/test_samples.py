"""Assumed rows are laid out, counted and cut as real ones are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cocoa_pl.attention import Policy, make_plan
from cocoa_pl.data.batch import TEXT
from cocoa_pl.data.examples import CaptionExamples, PairExamples
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.planning.samples import Lengths, grid_of, grid_of_tokens, rank_rows
from cocoa_pl.planning.work import attention_work, window_lengths


def test_an_assumed_sample_is_laid_out_as_the_processor_does(
    processor: Processor, make_image: Callable[..., Any], lengths: Lengths
) -> None:
    assumed = replace(lengths, grid=(2, 3))
    ((blank,),) = rank_rows(CaptionExamples(), assumed, rows=1, merge_size=2, max_length=200)
    row = assumed.pair(0)
    image = make_image((84, 56))  # 2 x 3 visual tokens
    pair = replace(row, query=Item(row.query.text, (image,)))
    ((context, _),) = CaptionExamples()(pair, np.random.default_rng(0))
    real = processor(context, None, key=0, row_id="row")
    assert real.grids == blank.grids
    assert len(real.patches) == len(blank.patches)
    # Texts are as long as is assumed; here a word is more than one token.
    assert real.kinds[real.kinds != TEXT].tolist() == blank.kinds[blank.kinds != TEXT].tolist()
    assert (blank.kinds == TEXT).sum() == 2 * assumed.text


def test_fractions_of_images_spread_evenly(lengths: Lengths) -> None:
    assumed = replace(lengths, images_per_query=0.25, images_per_positive=1.5)
    pairs = [assumed.pair(row) for row in range(8)]
    assert sum(len(pair.query.media) for pair in pairs) == 2
    assert [len(pair.positive.media) for pair in pairs] == [1, 2] * 4


def test_a_row_has_a_sample_of_each_role(lengths: Lengths) -> None:
    assumed = replace(lengths, negatives=1)
    rows = rank_rows(PairExamples(max_negatives=1), assumed, rows=3, merge_size=2, max_length=200)
    query, positive = 24 + 2 + 30 + 1, 24 + 1
    expected = [(0, query), (1, positive), (2, positive)]
    assert [[(s.role, s.num_tokens) for s in row] for row in rows] == [expected] * 3


def test_too_long_a_sample_is_refused(lengths: Lengths) -> None:
    with pytest.raises(UserError, match=r"samples of 57 tokens, more than model.max_length=50"):
        rank_rows(PairExamples(max_negatives=0), lengths, rows=1, merge_size=2, max_length=50)


@pytest.mark.parametrize(
    ("pixels", "side", "grid"), [(112896, 28, (12, 12)), (112896, 32, (10, 10)), (100, 28, (1, 1))]
)
def test_the_largest_square_image(pixels: int, side: int, grid: tuple[int, int]) -> None:
    assert grid_of(pixels, token_side=side) == grid


def test_a_number_of_tokens_becomes_the_squarest_grid() -> None:
    assert [grid_of_tokens(n) for n in (256, 12, 7)] == [(16, 16), (3, 4), (1, 7)]


def test_windows_tile_an_image() -> None:
    grids = torch.tensor([[1, 8, 16], [1, 12, 10]])
    assert window_lengths(grids, side=8).tolist() == [64, 64, 64, 16, 32, 8]


def test_scores_follow_from_segments(policies: dict[str, Policy]) -> None:
    plan = make_plan(policies["eos_bridge"], torch.tensor([[5, 1, 3], [7, 1, 0]]))
    exact = 5 * 6 + 1 * 9 + 3 * 4 + 7 * 8 + 1 * 8
    assert attention_work(plan, "varlen").scores == exact == plan.num_scores
    assert attention_work(plan, "sdpa").scores >= exact
