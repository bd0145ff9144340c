"""Inputs made for vision towers from packed images equal those that they compute themselves."""

import pytest
import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from cocoa_pl.models.qwen_vl import interpolated_images, whole_images, windowed_images

# In patches; with windows of 112 pixels: cut ones, whole ones, a single one, equal images.
GRIDS = torch.tensor(
    [(1, 2, 2), (1, 24, 24), (1, 8, 8), (1, 10, 36), (1, 6, 2), (1, 24, 24), (2, 8, 12)]
)
BATCHES = {"all": GRIDS, "one": GRIDS[1:2], "backwards": GRIDS[[4, 3, 0]]}
each_batch = pytest.mark.parametrize("grids", BATCHES.values(), ids=BATCHES)


@each_batch
def test_positions_and_bounds_of_whole_images(grids: Tensor) -> None:
    found = whole_images(grids, merge_size=2)
    patches = grids.prod(1)
    assert torch.equal(found["position_ids"], get_vision_position_ids(grids, 2))
    assert found["cu_seqlens"].tolist() == [0, *patches.cumsum(0).tolist()]
    assert found["cu_seqlens"].dtype == torch.int32
    assert found["max_seqlen"] == patches.max()
    assert found["plan"].num_scores == int((patches**2).sum())


@each_batch
@pytest.mark.parametrize("window_size", [56, 112])
def test_windows(grids: Tensor, window_size: int) -> None:
    index, bounds = get_vision_window_index(grids, 2, window_size, 14)
    found = windowed_images(grids, merge_size=2, window_size=window_size, patch_size=14)
    assert torch.equal(found["window_index"], index)
    assert found["cu_window_seqlens"].tolist() == bounds.tolist()
    lengths = bounds.diff()
    assert found["max_window_seqlen"] == lengths.max() <= (window_size // 14) ** 2
    assert found["window_plan"].num_scores == int((lengths**2).sum())
    assert found["plan"].num_scores == int((grids.prod(1) ** 2).sum())
    assert set(grids.prod(1).cumsum(0).tolist()) <= set(bounds.tolist()), "none holds two images"


@each_batch
@pytest.mark.parametrize("side", [4, 48])
def test_interpolation(grids: Tensor, side: int) -> None:
    found = interpolated_images(grids, merge_size=2, side=side)
    index, weights = get_vision_interpolation_indices_and_weights(
        grids, side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(found["interp_indices"], index)
    assert torch.equal(found["interp_weights"], weights)
