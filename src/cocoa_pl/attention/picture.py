"""Draw a mask: rows attend to columns, coloured by segment."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

from cocoa_pl.attention.policy import SEGMENTS

# Unseen, then the segments as the column that is seen; colour-blind safe (Paul Tol).
COLOURS = ("#f4f4f2", "#4477aa", "#ccbb44", "#aa3377")
MAX_LABELS = 48


def draw_grid(
    path: Path,
    mask: Tensor,
    tokens: Sequence[str],
    *,
    segment_lengths: Sequence[int],
    title: str,
) -> None:
    """Write the grid as a PNG.

    Args:
        mask: (t, t) bool of one sample.
        tokens: what stands at each position.
        segment_lengths: CONTEXT, BOTTLENECK, TARGET.
    """
    columns = np.repeat([1, 2, 3], segment_lengths)
    cells = mask.numpy() * columns[None, :]
    size = len(tokens)
    side = min(12.0, max(3.2, 0.28 * size + 1.4))
    figure, axes = plt.subplots(figsize=(side, side + 0.3), layout="constrained")
    axes.imshow(cells, cmap=ListedColormap(COLOURS), vmin=0, vmax=3, interpolation="nearest")
    if size <= MAX_LABELS:
        labels = [token.strip() or repr(token) for token in tokens]
        axes.set_xticks(range(size), labels, rotation=90 if max(map(len, labels)) > 1 else 0)
        axes.set_yticks(range(size), labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1 if size <= MAX_LABELS else 0.2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{title}: rows see columns", fontsize=10)
    handles = [Patch(color=colour) for colour in COLOURS[1:]]
    figure.legend(handles, SEGMENTS, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
