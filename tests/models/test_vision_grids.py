"""What vision towers are given against what they would work out themselves."""

import pytest
import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from cocoa_pl.models import vision_grids

# In patches; with windows of 112 pixels: cut ones, whole ones, a single one, equal images.
GRIDS = [(1, 2, 2), (1, 24, 24), (1, 8, 8), (1, 10, 36), (1, 6, 2), (1, 24, 24), (2, 8, 12)]


def batch_of(*rows: int) -> Tensor:
    return torch.tensor([GRIDS[row] for row in rows])


BATCHES = {"all": batch_of(*range(len(GRIDS))), "one": batch_of(1), "backwards": batch_of(4, 3, 0)}


@pytest.mark.parametrize("grids", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("window_size", [56, 112])
def test_windows_of_packed_images_equal_the_stock_ones(grids: Tensor, window_size: int) -> None:
    index, cumulative = get_vision_window_index(grids, 2, window_size, 14)
    found = vision_grids.windows(grids, merge_size=2, window_size=window_size, patch_size=14)
    assert torch.equal(found.index, index)
    assert torch.equal(found.lengths.cumsum(0), cumulative[1:].long())


def test_no_window_holds_parts_of_two_images_or_is_larger_than_asked() -> None:
    grids = BATCHES["all"]
    found = vision_grids.windows(grids, merge_size=2, window_size=112, patch_size=14)
    bounds = set(found.lengths.cumsum(0).tolist())
    assert set(grids.prod(1).cumsum(0).tolist()) <= bounds
    assert int(found.lengths.max()) == (112 // 14) ** 2
    assert int(found.lengths.min()) > 0
    assert torch.equal(found.index.sort().values, torch.arange(int(grids.prod(1).sum()) // 4))


def test_plans_cover_the_same_patches_by_image_and_by_window() -> None:
    grids = BATCHES["all"]
    lengths = vision_grids.windows(grids, merge_size=2, window_size=112, patch_size=14).lengths
    plans = vision_grids.windowed_images(grids, merge_size=2, window_size=112, patch_size=14)[
        "plan"
    ]
    assert plans.images.num_scores == int((grids.prod(1) ** 2).sum())
    assert plans.windows.num_scores == int((lengths**2).sum())
    assert plans.images.cu_seqlens_q[-1] == plans.windows.cu_seqlens_q[-1]


@pytest.mark.parametrize("grids", BATCHES.values(), ids=BATCHES)
def test_positions_of_packed_images_equal_the_stock_ones(grids: Tensor) -> None:
    found = vision_grids.positions(grids, merge_size=2)
    assert torch.equal(found, get_vision_position_ids(grids, 2))


@pytest.mark.parametrize("grids", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("side", [4, 48])
def test_interpolation_of_packed_images_equals_the_stock_one(grids: Tensor, side: int) -> None:
    index, weights = vision_grids.interpolation(grids, merge_size=2, side=side)
    stock_index, stock_weights = get_vision_interpolation_indices_and_weights(
        grids, side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(index, stock_index)
    assert torch.equal(weights, stock_weights)
