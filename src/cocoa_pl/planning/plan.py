"""The plan of a run, as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cocoa_pl.planning import storage
from cocoa_pl.planning.memory import Setup
from cocoa_pl.planning.samples import Lengths
from cocoa_pl.planning.stage_plan import StagePlan
from cocoa_pl.planning.tuning import added_parameters, decoder_parameters, trained_parameters
from cocoa_pl.planning.verdict import GIB, Hardware, Remedy


@dataclass(frozen=True)
class Plan:
    """What `cocoa plan` found out.

    Attributes:
        title: the model, in words.
        mfu: the fraction of the hardware's peak that is assumed.
        rows: of the training data; None if unknown.
        workers: data workers of each process.
        remedies: empty if everything fits.
    """

    title: str
    setup: Setup
    stages: Sequence[StagePlan]
    hardware: Hardware
    mfu: float
    lengths: Lengths
    rows: int | None
    workers: int
    remedies: Sequence[Remedy]

    @property
    def fits(self) -> bool:
        return all(self.hardware.fits(stage) for stage in self.stages)

    @property
    def decoder(self) -> bool:
        """Some stage trains the image decoder."""
        return any(stage.load.decoder for stage in self.stages)

    @property
    def parameters(self) -> dict[str, int]:
        """The model's own, what an adapter adds, what trains, and the image decoder beside it."""
        setup = self.setup
        found = {"model": setup.shape.parameters}
        if setup.adapter is not None:
            found["adapters"] = added_parameters(setup.shape, setup.tuning)
        found["trainable"] = trained_parameters(setup.shape, setup.tuning)
        if self.decoder:
            found["image decoder (trainable)"] = decoder_parameters(setup.shape)
        return found

    def hours(self, stage: StagePlan) -> float:
        return stage.steps * stage.seconds(self.hardware.tflops, self.mfu) / 3600

    @property
    def disk(self) -> dict[str, int]:
        return storage.disk(self.setup, self.lengths, rows=self.rows, decoder=self.decoder)

    @property
    def host_memory(self) -> dict[str, int]:
        largest = max(self.stages, key=lambda stage: stage.load.patches)
        return storage.host_memory(
            self.setup,
            self.lengths,
            rows=self.rows,
            workers=self.workers,
            batch_tokens=largest.tokens,
            batch_patches=largest.load.patches,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: bytes, floating-point operations, seconds, hours."""
        return {
            "model": self.title,
            "fits": self.fits,
            "hardware": self.hardware.name,
            "gpus": self.setup.gpus,
            "mfu": self.mfu,
            "parameters": self.parameters,
            "stages": {stage.stage.name: self._stage(stage) for stage in self.stages},
            "hours": math.fsum(self.hours(stage) for stage in self.stages),
            "gpu_hours": self.setup.gpus * math.fsum(self.hours(stage) for stage in self.stages),
            "disk_bytes": self.disk,
            "host_memory_bytes": self.host_memory,
            "assumed": asdict(self.lengths) | {"rows": self.rows},
            "remedies": [asdict(remedy) for remedy in self.remedies],
        }

    def _stage(self, stage: StagePlan) -> dict[str, Any]:
        needed = self.hardware.needed(stage.memory)
        return {
            "steps": stage.steps,
            "tokens_per_step": stage.tokens * self.setup.gpus,
            "chunks_per_gpu": len(stage.load.works),
            "memory_bytes": {part: round(size * GIB) for part, size in needed.items()},
            "flops_per_step_and_gpu": {part: asdict(cost) for part, cost in stage.costs.items()},
            "seconds_per_step": stage.seconds(self.hardware.tflops, self.mfu),
            "hours": self.hours(stage),
        }
