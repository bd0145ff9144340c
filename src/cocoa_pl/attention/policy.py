"""A policy is a 3 x 3 table of data: which segment's rows see which segment's columns.

    eos_bridge, CONTEXT of 2, BOTTLENECK of 1 (EOS), TARGET of 2 (rows attend to columns):

        A A E B B
        1 1 1 0 0
        1 1 1 0 0
        1 1 1 1 1
        0 0 1 1 1
        0 0 1 1 1

`dense_mask` spells the table out for every pair of tokens. It is the oracle in tests and the
picture in docs, never the fast path: that is `plan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEGMENTS = ("context", "bottleneck", "target")


@dataclass(frozen=True)
class Policy:
    """Who sees whom inside one sample; samples never see each other.

    Args:
        name: what logs and exports call it.
        context, bottleneck, target: the segments that the rows of this segment attend to.
        causal: a token sees of these only itself and earlier tokens.

    Raises:
        ValueError: for an unknown segment, or a row that does not see itself.
    """

    name: str
    context: Sequence[str]
    bottleneck: Sequence[str]
    target: Sequence[str]
    causal: bool

    def __post_init__(self) -> None:
        for row in SEGMENTS:
            seen = getattr(self, row)
            if unknown := set(seen) - set(SEGMENTS):
                raise ValueError(
                    f"attention policy {self.name}: {row} names unknown segments {unknown}; there "
                    f"are {', '.join(SEGMENTS)}"
                )
            if row not in seen:
                raise ValueError(f"attention policy {self.name}: {row} must at least see itself")

    @property
    def table(self) -> Tensor:
        """(3, 3) bool, rows attend to columns, in the order of `SEGMENTS`."""
        return torch.tensor(
            [[column in getattr(self, row) for column in SEGMENTS] for row in SEGMENTS]
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data from which `from_dict` builds the policy again."""
        rows: dict[str, object] = {row: list(getattr(self, row)) for row in SEGMENTS}
        return {"name": self.name, **rows, "causal": self.causal}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """The policy that a model's folder describes."""
        return cls(**with_current_names(data))


def with_current_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of a policy, in which BOTTLENECK was called `eos` at first."""
    rows = {"bottleneck" if key == "eos" else key: value for key, value in data.items()}
    seen = {s: ["bottleneck" if x == "eos" else x for x in rows[s]] for s in SEGMENTS}
    return {**rows, **seen}


def dense_mask(policy: Policy, segment_lengths: Tensor) -> Tensor:
    """The policy as one boolean per pair of packed tokens.

    Args:
        segment_lengths: (S, 3) int64.

    Returns:
        (T, T) bool, True where the row's token sees the column's token.
    """
    num_samples = len(segment_lengths)
    flat = segment_lengths.flatten()
    segment = torch.repeat_interleave(torch.arange(3).repeat(num_samples), flat)  # (T)
    sample = torch.repeat_interleave(torch.arange(num_samples), segment_lengths.sum(1))  # (T)
    allowed = policy.table[segment][:, segment] & (sample[:, None] == sample[None, :])
    return allowed.tril() if policy.causal else allowed


def segment_letters(segment_lengths: Sequence[int]) -> str:
    """What stands over the grid of one sample: A for CONTEXT, E for BOTTLENECK, B for TARGET."""
    return "".join(letter * length for letter, length in zip("AEB", segment_lengths, strict=True))


def grid_text(mask: Tensor, labels: Sequence[str]) -> str:
    """A mask as the 0/1 grid of the paper's figure, with a header of one-letter labels."""
    rows = [" ".join(labels)]
    rows += [" ".join("1" if seen else "0" for seen in row) for row in mask.tolist()]
    return "\n".join(rows)
