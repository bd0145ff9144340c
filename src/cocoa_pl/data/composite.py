"""Data sources by stage in, one source out: generative stages on captions, contrast on pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cocoa_pl.data.items import EvalSubset
from cocoa_pl.errors import UserError


class DataOfStages:
    """A source of its own for each stage.

    Args:
        stages: stage name -> what any other data config builds.
        scored: the stage whose held-out rows `benchmark=pairs` scores.
    """

    def __init__(self, *, stages: Mapping[str, Any], scored: str) -> None:
        if scored not in stages:
            raise UserError(f"data.scored names {scored}; data.stages holds {', '.join(stages)}")
        self.stages = dict(stages)
        self.scored = scored

    def source(self, stage: str) -> Any:
        """The stage's source.

        Raises:
            UserError: if it has none.
        """
        if stage not in self.stages:
            raise UserError(
                f"stage {stage} has no data; data.stages holds {', '.join(self.stages)}: "
                f"add data.stages.{stage}, or leave the stage out with stage.order"
            )
        return self.stages[stage]

    def validation_subsets(self) -> list[EvalSubset]:
        """The held-out rows of the scored stage's source."""
        subsets: list[EvalSubset] = self.stages[self.scored].validation_subsets()
        return subsets

    def training_texts(self) -> Sequence[str]:
        """All distinct training texts of all stages, sorted."""
        return sorted({t for source in self.stages.values() for t in source.training_texts()})


def source_of(data: Any, stage: str) -> Any:
    """What a stage trains on: the data themselves, or the stage's own among data of stages."""
    return data.source(stage) if isinstance(data, DataOfStages) else data
