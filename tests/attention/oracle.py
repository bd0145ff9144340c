"""The slow twin of every kernel: one dense mask over the whole row, and plain softmax attention."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from cocoa_pl.attention import SEGMENTS, Policy

CONF = Path(__file__).parents[2] / "conf" / "attention"


def load_policy(name: str) -> Policy:
    policy: Policy = instantiate(OmegaConf.load(CONF / f"{name}.yaml"), _convert_="all")
    return policy


def table(name: str, *rows: str, causal: bool = False) -> Policy:
    """What A, E and B see, as letters."""
    names = dict(zip("AEB", SEGMENTS, strict=True))
    return Policy(name, *([names[letter] for letter in row] for row in rows), causal=causal)


OURS = {file.stem: load_policy(file.stem) for file in sorted(CONF.glob("*.yaml"))}
TABLES = {
    "full": ("AEB", "AEB", "AEB"),
    "bridge": ("AE", "AEB", "EB"),
    "isolated": ("A", "E", "B"),
    "gap": ("AB", "AEB", "AB"),  # two ranges of keys with one between them
    "late": ("A", "E", "AB"),
}
POLICIES = OURS | {
    name: table(name, *rows, causal=name.startswith("causal "))
    for stem, rows in TABLES.items()
    for name in (stem, f"causal {stem}")
}

LENGTHS = {
    "one token": [[0, 1, 0]],
    "no target": [[5, 1, 0], [3, 1, 0]],
    "no context": [[0, 1, 4], [0, 1, 2]],
    "equal samples": [[3, 1, 2], [3, 1, 2]],
    "mixed": [[9, 1, 4], [0, 1, 7], [2, 1, 0], [0, 1, 0], [17, 1, 30], [1, 1, 1]],
    "bottleneck of three": [[9, 3, 4], [0, 3, 7], [2, 3, 0], [0, 3, 0], [17, 3, 30], [1, 3, 1]],
}


def random_lengths(seed: int, *, longest: int = 24) -> Tensor:
    """(S, 3) with 1 or 3 tokens of BOTTLENECK; about every fourth CONTEXT or TARGET is empty."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 9, (), generator=generator))
    lengths = torch.randint(-longest // 3, longest, (samples, 3), generator=generator).clamp(min=0)
    lengths[:, 1] = 1 + 2 * (seed % 2)
    return lengths


def states(
    tokens: int,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    width: int = 8,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, n, width, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(Tq, H, D), (Tk, H_kv, D) twice, (Tq, Tk) True = seen -> (Tq, H, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a random linear function of the output."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * weight.to(output)).sum(), inputs)


def assert_equals_dense(
    output: Tensor, inputs: list[Tensor], mask: Tensor, scale: float, *, bound: float
) -> None:
    """Output and gradients against float64, as a share of their norms."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense_attention(exact[0], exact[1], exact[2], mask.to(output.device), scale)
    assert output.shape == expected.shape
    pairs = [(output, expected)]
    pairs += zip(gradients(output, inputs), gradients(expected, exact), strict=True)
    for found, wanted in pairs:
        difference = (found.detach().double() - wanted.detach()).norm()
        assert float(difference) < bound * max(float(wanted.detach().norm()), 0.01)
