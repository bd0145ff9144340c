"""Stages, a backbone and data in; the trained backbone and its lineage out, one stage handing over
to the next.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
from rich.console import Console

from cocoa_pl import checkpoint
from cocoa_pl.attention import Policy
from cocoa_pl.callbacks import Pictures, StageProgress
from cocoa_pl.checkpoint import LastCheckpoint
from cocoa_pl.data.composite import DataOfStages, source_of
from cocoa_pl.data.datamodule import StageData, check_mixing
from cocoa_pl.data.examples import MakeSamples, describing, first_of_each_subset
from cocoa_pl.data.mixing import Mixing
from cocoa_pl.data.stream import PairStream
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.items import Pair
from cocoa_pl.loggers import LoggerFactory, Metrics
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.randomness import mix
from cocoa_pl.stages.base import Optimization, StageModule

log = logging.getLogger(__name__)

PROGRESS_LINES = 10  # of a stage, where there is no terminal


class TrainingData(Protocol):
    """What a data config must offer."""

    caption_subsets: Sequence[str] | None

    def train_pairs(self) -> Sequence[Pair] | PairStream: ...

    def validation_pairs(self) -> Sequence[Pair]: ...

    def training_texts(self) -> list[str]: ...


@dataclass(frozen=True)
class Stage:
    """One stage, as its config says.

    Args:
        module: makes the stage's module of a backbone and a processor.
        make_samples: what the stage makes of a pair.
        describing: use only pairs of an image and its text, of the data's caption subsets.
        mixing: how batches are composed of subsets.
        max_rows_per_subset: training rows used of each subset, from the first on; None for all.
        batch_size: rows of a step over all ranks.
        steps, epochs: how long; exactly one is given.
        validate_every: steps between validations; there is always one at the end.
        policy: attention while it trains.

    Raises:
        UserError: unless exactly one of steps and epochs is given, and all counts are positive.
    """

    name: str
    module: Callable[..., StageModule]
    make_samples: MakeSamples
    describing: bool
    mixing: Mixing
    max_rows_per_subset: int | None
    batch_size: int
    validation_batch_size: int
    steps: int | None
    epochs: float | None
    validate_every: int
    policy: Policy
    optimization: Optimization
    token_budget: int

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"stage {self.name}: give either steps or epochs")
        positive = ("batch_size", "validation_batch_size", "validate_every", "token_budget")
        for field in (*positive, "steps" if self.epochs is None else "epochs"):
            if getattr(self, field) <= 0:
                raise UserError(f"stage {self.name}: {field} must be positive")

    def count_steps(self, num_rows: int | None) -> int:
        """Optimizer steps of the stage; `num_rows` is None for a stream.

        Raises:
            UserError: for epochs of a stream.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if num_rows is None:
            raise UserError(
                f"stage {self.name}: a stream has no length, so epochs cannot be counted; "
                f"give steps (schedule.{self.name}.steps=... schedule.{self.name}.epochs=null)"
            )
        return max(1, math.floor(self.epochs * (num_rows // self.batch_size)))


@dataclass(frozen=True)
class RunSettings:
    """What all stages of a run share."""

    run_dir: Path
    trainer: Callable[..., L.Trainer]
    loggers: LoggerFactory
    console: Console
    seed: int
    num_workers: int
    on_bad_row: str
    checkpoint_every: int

    @property
    def last(self) -> Path:
        return self.run_dir / "checkpoints" / "last.ckpt"


class Interrupted(Exception):
    """The run was asked to stop and has saved itself."""


def run_stages(
    stages: Sequence[Stage],
    backbone: Backbone,
    processor: Processor,
    data: TrainingData | DataOfStages,
    settings: RunSettings,
    *,
    resume: bool,
) -> list[dict[str, Any]]:
    """Train the stages one after the other; each starts from the backbone that the one before left.

    Args:
        resume: go on from the run's `last.ckpt`.

    Returns:
        One lineage entry for each stage.

    Raises:
        Interrupted: when somebody stopped the run.
    """
    settings.last.parent.mkdir(parents=True, exist_ok=True)
    rows = [_rows_of(stage, source_of(data, stage.name)) for stage in stages]
    state = checkpoint.read(settings.last) if resume else None
    lineage: list[dict[str, Any]] = []
    for index, stage in enumerate(stages):
        stage_of_state = state["cocoa"]["stage_index"] if state else -1
        if index < stage_of_state:
            continue
        resumed = state if index == stage_of_state else None
        if resumed is not None:
            lineage = resumed["cocoa"]["lineage"]
        entry = _run_stage(
            stage,
            backbone,
            rows[index],
            processor,
            settings,
            label=f"{index + 1}/{len(stages)} {stage.name}",
            index=index,
            lineage=lineage,
            start_step=resumed["global_step"] if resumed is not None else 0,
        )
        lineage = [*lineage, entry]
    return lineage


@dataclass(frozen=True)
class StageRows:
    """Pairs of a stage."""

    train: Sequence[Pair] | PairStream
    validation: Sequence[Pair]

    @property
    def num_train(self) -> int | None:
        """None for a stream."""
        return None if isinstance(self.train, PairStream) else len(self.train)


def _rows_of(stage: Stage, source: TrainingData) -> StageRows:
    """What the stage trains on; what it cannot train on is refused before any stage begins."""
    train, validation = source.train_pairs(), source.validation_pairs()
    if stage.describing:
        train = describing(train, source.caption_subsets)
        validation = describing(validation, source.caption_subsets) if validation else []
    rows = StageRows(first_of_each_subset(train, stage.max_rows_per_subset), validation)
    stage.count_steps(rows.num_train)
    check_mixing(rows.train, stage.mixing, batch_size=stage.batch_size)
    return rows


def _run_stage(
    stage: Stage,
    backbone: Backbone,
    rows: StageRows,
    processor: Processor,
    settings: RunSettings,
    *,
    label: str,
    index: int,
    lineage: list[dict[str, Any]],
    start_step: int,
) -> dict[str, Any]:
    steps = stage.count_steps(rows.num_train)
    seed = mix(settings.seed, index)
    L.seed_everything(seed % 2**32, verbose=False)  # new heads
    module = stage.module(
        backbone,
        processor=processor,
        policy=stage.policy,
        optimization=stage.optimization,
        token_budget=stage.token_budget,
        steps=steps,
        seed=seed,
    ).train()  # from_pretrained leaves a model in eval mode, without dropout
    data = StageData(
        rows.train,
        rows.validation,
        make_samples=stage.make_samples,
        processor=processor,
        mixing=stage.mixing,
        batch_size=stage.batch_size,
        validation_batch_size=stage.validation_batch_size,
        steps=steps,
        start_step=start_step,
        seed=seed,
        num_workers=settings.num_workers,
        on_bad_row=settings.on_bad_row,
    )
    saver = LastCheckpoint(
        settings.last,
        every=settings.checkpoint_every,
        position={"stage": stage.name, "stage_index": index, "lineage": lineage},
    )
    trainer = _make_trainer(stage, settings, saver, label=label, start_step=start_step, steps=steps)
    log.info(
        "%s: %s rows, %d steps of %d, attention %s, lr %g",
        label,
        "streamed" if rows.num_train is None else rows.num_train,
        steps,
        stage.batch_size,
        stage.policy.name,
        stage.optimization.lr,
    )
    trainer.fit(module, data, ckpt_path=settings.last if start_step else None)
    if saver.stopped:
        raise Interrupted(f"stopped in {stage.name} at step {trainer.global_step} of {steps}")
    metrics: dict[str, float] = {}
    if rows.validation:
        if start_step == steps or steps % stage.validate_every:  # else the last step just did
            trainer.validate(module, data, verbose=False)
        metrics = _validation_metrics(trainer)
        log.info("%s done; %s", label, module.hand_over(metrics))
    else:
        log.info("%s done; there is no validation data to judge it by", label)
    return {
        "stage": stage.name,
        "steps": steps,
        "batch_size": stage.batch_size,
        "lr": stage.optimization.lr,
        "policy": stage.policy.name,
        "seed": settings.seed,
        "validation": metrics,
    }


def _make_trainer(
    stage: Stage,
    settings: RunSettings,
    saver: LastCheckpoint,
    *,
    label: str,
    start_step: int,
    steps: int,
) -> L.Trainer:
    """The config's trainer, with what the recipe decides: steps, validation, loggers, callbacks."""
    return settings.trainer(
        default_root_dir=settings.run_dir,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=stage.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        logger=[
            Metrics(settings.run_dir, stage.name, start_step=start_step, steps=steps),
            *settings.loggers(settings.run_dir, stage.name),
        ],
        callbacks=[
            StageProgress(label, steps=steps, console=settings.console, lines=PROGRESS_LINES),
            Pictures(settings.run_dir, stage.name),
            saver,
        ],
    )


def _validation_metrics(trainer: L.Trainer) -> dict[str, float]:
    return {
        name.removeprefix("validation/"): value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith("validation/")
    }
