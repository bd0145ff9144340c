"""Text runs and image grids in, M-RoPE positions out (Qwen2-VL, arXiv 2409.12191)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def mrope_positions(spans: Sequence[int | tuple[int, int, int]], *, merge_size: int) -> Tensor:
    """Positions of one sample whose parts are runs of text (their length) and images (their grid in
    patches).

    Text advances all three axes together; an image's tokens share the temporal index and count rows
    and columns; what follows starts behind the larger side of the image. Equals `get_rope_index` of
    the stock model (tested).

    Returns:
        (3, t) int64: temporal, height, width.
    """
    columns, start = [], 0
    for span in spans:
        if isinstance(span, int):
            columns.append(torch.arange(start, start + span).expand(3, -1))
            start += span
        else:
            frames, height, width = span[0], span[1] // merge_size, span[2] // merge_size
            axes = torch.meshgrid(
                torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
            )
            columns.append(torch.stack([axis.flatten() for axis in axes]) + start)
            start += max(height, width)
    return torch.cat(columns, dim=1)
