"""Assert that the results of both sides are equal to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The peer embeds patches by a convolution, which cuDNN computes in TF32 unless that is off: 3e-4.
torch.backends.cudnn.allow_tf32 = False

# Of the norm of the difference, relative to the norm. The two sides add up in different orders: in
# float32 that is 4e-6 at most (true widths, two layers, on a CPU). In bfloat16 losses and gradients
# through 28 layers differ by 4e-2, so that this is a bound for sanity and no more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-1}


def assert_close(
    ours: Sequence[Tensor], peer: Sequence[Tensor], *, dtype: torch.dtype | None = None
) -> None:
    """Every pair of tensors is equal in shape, and in value up to rounding of their type.

    Args:
        dtype: what was computed in, where it is not the type of the results.
    """
    assert len(ours) == len(peer)
    for place, (found, expected) in enumerate(zip(ours, peer, strict=True)):
        assert found.shape == expected.shape, (place, found.shape, expected.shape)
        assert found.isfinite().all(), f"result {place} is not finite"
        narrow = min((found.dtype, expected.dtype), key=lambda t: torch.finfo(t).bits)
        tolerance = TOLERANCE[dtype or narrow]
        error = (found.double() - expected.double()).norm()
        scale = expected.double().norm()
        assert error <= tolerance * scale, (
            f"result {place} differs by {float(error / scale):.2g} of its norm, more than "
            f"{tolerance:.0e}"
        )
