"""What a report says of where its numbers come from, beside the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cocoa_pl.attention import Policy, dense_mask, segment_letters

GRID_LENGTHS = (4, 1, 3)  # CONTEXT, EOS, TARGET of the sample that grids show


@dataclass(frozen=True)
class Grid:
    """Who sees whom: `rows[row][column]` is the letter of what is seen, or a blank."""

    name: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """Where the scored model comes from; what is empty is left out of the report.

    Attributes:
        facts: what a reader should know first, e.g. `{"attention": "causal", "seed": 1}`.
        lineage: what each stage that made the weights left in `cocoa.json`.
        policies: attention by what it is used for, such as a stage's name.
        config: the run's configuration, as YAML.
        metrics_csv: the run's logged numbers, drawn as loss curves.
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    lineage: Sequence[Mapping[str, Any]] = ()
    policies: Mapping[str, Policy] = field(default_factory=dict)
    config: str | None = None
    metrics_csv: Path | None = None

    @property
    def grids(self) -> list[Grid]:
        """Each policy once, named after all that use it."""
        users: dict[str, tuple[Policy, list[str]]] = {}
        for user, policy in self.policies.items():
            users.setdefault(policy.name, (policy, []))[1].append(user)
        return [
            Grid(f"{name}: {', '.join(names)}", grid_rows(policy))
            for name, (policy, names) in users.items()
        ]


def grid_rows(policy: Policy) -> tuple[str, ...]:
    """The policy's mask of one short sample, a string for each row."""
    mask = dense_mask(policy, torch.tensor([GRID_LENGTHS]))
    columns = segment_letters(GRID_LENGTHS)
    return tuple(
        "".join(letter if seen else " " for letter, seen in zip(columns, row, strict=True))
        for row in mask.tolist()
    )
