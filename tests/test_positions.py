"""M-RoPE positions by hand; parity with the stock model is in `models/test_stock_parity.py`."""

import torch

from cocoa_pl.positions import mrope_positions


def test_text_advances_all_axes_together() -> None:
    assert mrope_positions([4], merge_size=2).tolist() == [[0, 1, 2, 3]] * 3


def test_image_counts_rows_and_columns_and_text_goes_on_behind_its_larger_side() -> None:
    # two words, an image of 2 x 3 visual tokens, one word
    assert mrope_positions([2, (1, 4, 6), 1], merge_size=2).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_one_visual_token_counts_like_a_word() -> None:
    positions = mrope_positions([1, (1, 2, 2), 1], merge_size=2)
    assert torch.equal(positions, mrope_positions([3], merge_size=2))


def test_empty_runs_change_nothing() -> None:
    positions = mrope_positions([0, (1, 4, 2), 0], merge_size=2)
    assert torch.equal(positions, mrope_positions([(1, 4, 2)], merge_size=2))
    assert positions.dtype == torch.int64
