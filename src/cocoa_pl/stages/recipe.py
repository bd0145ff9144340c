"""Train stages one after the other: each starts from the backbone that the one before left."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from cocoa_pl.attention import Policy
from cocoa_pl.config.bounds import Count, Positive
from cocoa_pl.data.datamodule import StageData, check_mixing
from cocoa_pl.data.examples import MakeSamples, check_contrast
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import Mixing, mix
from cocoa_pl.data.sources import source_of
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import Interrupted, UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.stages import checkpoint
from cocoa_pl.stages.base import Optimization, StageModule
from cocoa_pl.stages.callbacks import Metrics, close
from cocoa_pl.stages.checkpoint import LastCheckpoint
from cocoa_pl.stages.trainer import Parts, make_trainer

log = logging.getLogger(__name__)


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
        UserError: unless exactly one of steps and epochs is given, or for a warm-up that is longer.
    """

    name: str
    module: Callable[..., StageModule]
    make_samples: MakeSamples
    describing: bool
    mixing: Mixing
    max_rows_per_subset: Count | None
    batch_size: Count
    validation_batch_size: Count
    steps: Count | None
    epochs: Positive | None
    validate_every: Count
    policy: Policy
    optimization: Optimization
    token_budget: Count

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"stage {self.name}: give either steps or epochs")
        if self.steps is not None:
            self.count_steps(None)

    def count_steps(self, num_rows: int | None) -> int:
        """Optimizer steps of the stage; `num_rows` is None for a stream.

        Raises:
            UserError: for epochs of a stream, or a warm-up that is longer than the stage.
        """
        steps = self.steps
        if steps is None:
            assert self.epochs is not None
            if num_rows is None:
                raise UserError(
                    f"stage {self.name}: a stream has no length, so epochs cannot be counted; "
                    f"give steps (stage.{self.name}.steps=... stage.{self.name}.epochs=null)"
                )
            steps = max(1, math.floor(self.epochs * (num_rows // self.batch_size)))
        if self.optimization.warmup_steps > steps:
            raise UserError(
                f"stage {self.name}: a warm-up of {self.optimization.warmup_steps} steps is longer "
                f"than its {steps} steps; lower stage.{self.name}.optimization.warmup_steps"
            )
        return steps

    def make_module(
        self, backbone: Backbone, processor: Processor, *, steps: int, seed: int
    ) -> StageModule:
        """The stage's module around a backbone, in training mode, which from_pretrained leaves."""
        return self.module(
            backbone,
            processor=processor,
            policy=self.policy,
            optimization=self.optimization,
            token_budget=self.token_budget,
            steps=steps,
            seed=seed,
        ).train()


@dataclass(frozen=True, eq=False)
class Recipe:
    """Stages of one run; each starts from the backbone that the one before left.

    Args:
        data: what a data config builds (`data.sources`).
        parts: what the config says of a stage's trainer, by the stage's name.
        config: of the run, plain, for loggers.
        export: name of the checkpoint that the model is taken from in the end, `last` or `best`.
    """

    stages: Sequence[Stage]
    backbone: Backbone
    processor: Processor
    data: Any
    run_dir: Path
    parts: Callable[[str], Parts]
    config: Mapping[str, Any]
    seed: int
    num_workers: int
    on_bad_row: str
    checkpoint_every: int
    export: str

    @property
    def last(self) -> Path:
        return self.run_dir / checkpoint.LAST

    def run(self, *, resume: bool) -> list[dict[str, Any]]:
        """Train the stages one after the other.

        Args:
            resume: go on from the run's `last.ckpt`; one that was killed before its first
                checkpoint begins anew.

        Returns:
            One lineage entry for each stage.

        Raises:
            Interrupted: when the run was stopped.
        """
        self.last.parent.mkdir(parents=True, exist_ok=True)
        rows = [_rows_of(stage, source_of(self.data, stage.name)) for stage in self.stages]
        self._check_stages(rows)
        base = checkpoint.base_of(self.backbone)
        facts = [[train.num_rows, train.fingerprint] for train, _ in rows]
        first, start_step = 0, 0
        lineage: list[dict[str, Any]] = []
        if resume and not (self.last.exists() or (self.run_dir / "model").exists()):
            log.info("%s has no checkpoint yet: the run begins anew", self.run_dir)
        elif resume:
            state = checkpoint.read(self.last)
            checkpoint.check_base(state, base, where=str(self.last))
            first, start_step = state["cocoa"]["stage_index"], state["global_step"]
            lineage = state["cocoa"]["lineage"]
            self._check_rows(state["cocoa"]["rows"], facts, first)
            del state  # its weights are read once more by the trainer
        for index in range(first, len(self.stages)):
            position = {"stage": self.stages[index].name, "stage_index": index, "lineage": lineage}
            position |= {"base": base, "rows": facts}
            lineage = [*lineage, self._train(index, *rows[index], position, start_step)]
            start_step = 0
        return lineage

    def _check_stages(self, rows: Sequence[tuple[Pairs | PairStream, Pairs]]) -> None:
        """Refuse before days of training what a later stage's module refuses, and to export what
        no callback will keep; say which callbacks monitor what no stage logs.
        """
        measures = []
        for stage, (_, validation) in zip(self.stages, rows, strict=True):
            module = stage.make_module(self.backbone, self.processor, steps=1, seed=0)
            measures.append(module.measures if validation else ())
        kept = {"last"}
        for callback in self.parts(self.stages[-1].name).callbacks:
            if not any(takes_part(callback, names) for names in measures):
                log.info(
                    "%s does nothing: no stage of this run logs %s",
                    type(callback).__name__,
                    callback.monitor,  # type: ignore[attr-defined]
                )
            if isinstance(callback, ModelCheckpoint) and takes_part(callback, measures[-1]):
                kept.add(str(callback.filename))
        if self.export not in kept:
            raise UserError(
                f"export={self.export}: stage {self.stages[-1].name} keeps no such checkpoint, "
                f"only {', '.join(sorted(kept))}; one that is chosen by a metric needs validation "
                "data and a stage that logs it (conf/callbacks/default.yaml)"
            )

    def _check_rows(self, before: list[Any], facts: list[Any], first: int) -> None:
        """Refuse to resume on training rows that are not those which the run was trained on; what
        stages before the first have read is learnt.
        """
        for stage, was, now in list(zip(self.stages, before, facts, strict=True))[first:]:
            if was != now:
                what = f"{was[0]} rows then, {now[0]} now"
                if was[0] == now[0]:
                    what = "as many rows, of other content or in another order"
                raise UserError(
                    f"the training data of stage {stage.name} changed since the run stopped "
                    f"({what}), and a run goes on exactly or not at all: put the data back, or "
                    + checkpoint.begin_another(self.last)
                )

    def _train(
        self,
        index: int,
        train: Pairs | PairStream,
        validation: Pairs,
        position: dict[str, Any],
        start_step: int,
    ) -> dict[str, Any]:
        """Train one stage behind the `start_step` steps of the last checkpoint, and return its
        lineage entry.
        """
        stage, label = self.stages[index], f"{index + 1}/{len(self.stages)} {position['stage']}"
        steps, seed = stage.count_steps(train.num_rows), mix(self.seed, index)
        L.seed_everything(seed % 2**32, verbose=False)  # new heads
        module = stage.make_module(self.backbone, self.processor, steps=steps, seed=seed)
        module.label = label
        saver = LastCheckpoint(self.last, every=self.checkpoint_every, position=position)
        metrics_csv = Metrics(self.run_dir, stage.name, start_step=start_step, steps=steps)
        parts = self.parts(stage.name)
        callbacks = [c for c in parts.callbacks if takes_part(c, module.measures)]
        parts = parts._replace(callbacks=[*callbacks, saver], loggers=[metrics_csv, *parts.loggers])
        trainer = make_trainer(parts, steps=steps, validate_every=stage.validate_every)
        is_single = trainer.precision == "32-true"
        self.backbone.compute_dtype = torch.float32 if is_single else torch.bfloat16
        device = trainer.strategy.root_device
        data = StageData(
            train=train,
            validation=validation,
            make_samples=stage.make_samples,
            processor=self.processor,
            masking=module.masking,
            collator=module.collator(validating=False, device=device),
            validation_collator=module.collator(validating=True, device=device),
            mixing=stage.mixing,
            batch_size=stage.batch_size,
            validation_batch_size=stage.validation_batch_size,
            steps=steps,
            start_step=start_step,
            seed=seed,
            num_workers=self.num_workers,
            on_bad_row=self.on_bad_row,
            pinned=device.type == "cuda",
        )
        log.info(
            "%s: %s rows, %d steps of %d, attention %s, lr %g",
            label,
            train.num_rows or "streamed",
            steps,
            stage.batch_size,
            stage.policy.name,
            stage.optimization.lr,
        )
        try:
            for logger in trainer.loggers:
                logger.log_hyperparams(dict(self.config))
            trainer.fit(module, data, ckpt_path=self.last if start_step else None)
            taken = trainer.global_step
            if saver.stopped:
                raise Interrupted(f"stopped in {stage.name} at step {taken} of {steps}")
            if taken < steps:
                log.warning(
                    "%s: ended at step %d of %d by trainer.max_steps, trainer.max_time, "
                    "trainer.limit_train_batches, trainer.fast_dev_run or a callback",
                    *(label, taken, steps),
                )
            metrics = _final_validation(trainer, module, data)
        finally:
            close(trainer.loggers)
        return {
            "stage": stage.name,
            "steps": taken,
            "batch_size": stage.batch_size,
            "lr": stage.optimization.lr,
            "policy": stage.policy.name,
            "seed": self.seed,
            "validation": metrics,
            **({"matryoshka_dims": list(module.dims[:-1])} if len(module.dims) > 1 else {}),
        }


def _rows_of(stage: Stage, source: Any) -> tuple[Pairs | PairStream, Pairs]:
    """What the stage trains on and what validates it; what it cannot train on is refused before any
    stage begins.
    """
    train, validation = source.train_pairs(), Pairs.of(source.validation_pairs())
    train = train if isinstance(train, PairStream) else Pairs.of(train)
    if stage.describing:
        train = train.describing(source.caption_subsets)
        validation = validation.describing(source.caption_subsets) if validation else validation
    train = train.first_of_each_subset(stage.max_rows_per_subset)
    stage.count_steps(train.num_rows)
    check_mixing(train, stage.mixing, batch_size=stage.batch_size)
    try:
        check_contrast(train, stage.make_samples, batch_size=stage.batch_size)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from error
    return train, validation


def takes_part(callback: L.Callback, measures: Sequence[str]) -> bool:
    """Whether a stage logs the validation metric that a callback monitors, if it does."""
    monitor = callback.monitor if isinstance(callback, EarlyStopping | ModelCheckpoint) else None
    if monitor is None or not monitor.startswith("validation/"):
        return True
    return monitor.removeprefix("validation/") in measures


def _final_validation(trainer: L.Trainer, module: StageModule, data: StageData) -> dict[str, float]:
    """What validation found at the stage's last step, in words too; of a checkpoint of that step,
    behind which nothing was trained, it is measured now.
    """
    if not trainer.callback_metrics and len(data.validation):
        trainer.validate(module, data, verbose=False)
    metrics = {
        name.removeprefix("validation/"): value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith("validation/")
    }
    if metrics:
        log.info("%s done; %s", module.label, module.summary_line(metrics))
    else:
        log.info("%s done; there is no validation data to judge it by", module.label)
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
