"""`cocoa attention` prints a policy as a grid and draws it as a PNG."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from cocoa_pl.attention import SEGMENTS, Policy, dense_mask, grid_text, segment_letters
from cocoa_pl.config.build import build, check_values
from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.data.items import as_item
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError

# Unseen, then the segments as the column that is seen; colour-blind safe (Paul Tol).
COLOURS = ("#f4f4f2", "#4477aa", "#ccbb44", "#aa3377")
MAX_LABELS = 48


def run(arguments: Sequence[str], console: Console) -> int:
    """Print and draw who sees whom; the exit status is 0.

    Raises:
        UserError: for an unknown policy, wrong lengths, or an example without a model.
    """
    parsed = _parser().parse_args(arguments)
    policy = load_policy(parsed.policy)
    is_example = parsed.text or parsed.image or parsed.target
    lengths, tokens = _example(parsed) if is_example else (_lengths(parsed.lengths), None)
    counts = lengths[0].tolist()
    letters = segment_letters(counts)
    mask = dense_mask(policy, lengths)
    console.print(f"{policy.name}: rows attend to columns (A context, E bottleneck, B target)")
    console.print(grid_text(mask, letters), highlight=False, soft_wrap=True)
    png = Path(parsed.png or f"{policy.name}.png")
    png = png if png.suffix else png.with_suffix(".png")  # as it is written
    draw_grid(png, mask, tokens or letters, segment_lengths=counts, title=policy.name)
    console.print(f"picture: {png}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cocoa attention",
        description="Print an attention policy as a 0/1 grid and write it as a PNG. Rows attend "
        "to columns. Either give segment lengths, or an example: a text for CONTEXT (with an "
        "image) and one for TARGET, cut into tokens by a model's processor.",
    )
    parser.add_argument("policy", help="a file of conf/attention, e.g. eos_bridge, or a path")
    parser.add_argument(
        "--lengths", default="2,1,2", help="CONTEXT,BOTTLENECK,TARGET of one sample, e.g. 2,1,2"
    )
    parser.add_argument("--text", help="CONTEXT of an example")
    parser.add_argument("--image", help="an image in front of the text")
    parser.add_argument("--target", help="TARGET of an example")
    parser.add_argument("--model", help="whose tokens: a run, an exported folder or a hub id")
    parser.add_argument("--png", help="where the picture goes (default: POLICY.png)")
    return parser


def load_policy(name: str) -> Policy:
    """A policy of conf/attention by its file name, or of any file by its path.

    Raises:
        UserError: if there is none.
    """
    path = Path(name) if name.endswith(".yaml") else CONFIGS / "attention" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (CONFIGS / "attention").glob("*.yaml")))
        raise UserError(f"there is no attention policy {name}; there are {known}")
    try:
        policy: Any = OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); save it so") from error
    check_values(policy)
    return build(policy)


def _lengths(text: str) -> Tensor:
    try:
        context, bottleneck, target = (int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--lengths is CONTEXT,BOTTLENECK,TARGET, e.g. 2,1,2, not {text}"
        ) from error
    if min(context, target) < 0 or bottleneck < 1:
        raise UserError("--lengths: a sample has a BOTTLENECK and no negative lengths")
    return torch.tensor([[context, bottleneck, target]])


def _example(arguments: argparse.Namespace) -> tuple[Tensor, list[str]]:
    if not arguments.model:
        raise UserError("an example needs --model, whose processor cuts it into tokens")
    if not (arguments.text or arguments.image):
        raise UserError("an example needs --text or --image for its CONTEXT")
    processor = Embedder.load(arguments.model, device="cpu").processor
    context = as_item({"text": arguments.text or "", "image": arguments.image})
    sample = processor(context, arguments.target, key=0, row_id="the example")
    tokens = [processor.tokenizer.decode([i]) for i in sample.input_ids.tolist()]
    return torch.tensor([sample.segment_lengths]), tokens


def draw_grid(
    path: Path,
    mask: Tensor,
    tokens: Sequence[str],
    *,
    segment_lengths: Sequence[int],
    title: str,
) -> None:
    """Write a mask as a PNG: rows attend to columns, coloured by segment.

    Args:
        mask: (t, t) bool of one sample.
        tokens: what stands at each position.
        segment_lengths: CONTEXT, BOTTLENECK, TARGET.
    """
    cells = mask.numpy() * np.repeat([1, 2, 3], segment_lengths)
    size = len(tokens)
    side = min(12.0, max(3.2, 0.28 * size + 1.4))
    figure = Figure(figsize=(side, side + 0.3), layout="constrained")
    axes = figure.subplots()
    width = 1 if size <= MAX_LABELS else 0.2
    colours = ListedColormap(COLOURS)
    axes.pcolormesh(cells, cmap=colours, vmin=0, vmax=3, edgecolors="white", linewidth=width)
    axes.set(aspect="equal", ylim=(size, 0))
    if size <= MAX_LABELS:
        labels = [token.strip() or repr(token) for token in tokens]
        places = np.arange(size) + 0.5
        axes.set_xticks(places, labels, rotation=90 if max(map(len, labels)) > 1 else 0)
        axes.set_yticks(places, labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{title}: rows see columns", fontsize=10)
    handles = [Patch(color=colour) for colour in COLOURS[1:]]
    figure.legend(handles, SEGMENTS, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
