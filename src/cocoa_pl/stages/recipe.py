"""Train stages one after the other: each starts from the backbone that the one before left."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cocoa_pl.attention import Policy
from cocoa_pl.config.bounds import Count, Positive
from cocoa_pl.data.datamodule import StageData, check_mixing
from cocoa_pl.data.examples import MakeSamples, check_contrast
from cocoa_pl.data.items import Pair
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import Mixing, mix
from cocoa_pl.data.sources import DataOfStages, source_of
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import Interrupted, UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.stages import checkpoint
from cocoa_pl.stages.base import Optimization, StageModule
from cocoa_pl.stages.callbacks import Metrics, close
from cocoa_pl.stages.checkpoint import LastCheckpoint
from cocoa_pl.stages.trainer import Parts, make_trainer, takes_part

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


class TrainingData(Protocol):
    """What a data config must offer."""

    caption_subsets: Sequence[str] | None
    left_out: Sequence[UserError]

    def train_pairs(self) -> Sequence[Pair] | PairStream: ...

    def validation_pairs(self) -> Sequence[Pair]: ...

    def training_texts(self) -> list[str]: ...


@dataclass(frozen=True)
class RunSettings:
    """What all stages of a run share.

    Args:
        parts: what the config says of a stage's trainer, by the stage's name.
        config: of the run, plain, for loggers.
        export: name of the checkpoint that the model is taken from in the end, `last` or `best`.
    """

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
        resume: go on from the run's `last.ckpt`; one that was killed before its first checkpoint
            begins anew.

    Returns:
        One lineage entry for each stage.

    Raises:
        Interrupted: when the run was stopped.
    """
    settings.last.parent.mkdir(parents=True, exist_ok=True)
    rows = [_rows_of(stage, source_of(data, stage.name)) for stage in stages]
    measures: list[Sequence[str]] = []
    for stage, (_, validation) in zip(stages, rows, strict=True):
        # A module of the last stage refuses before days of the others.
        module = stage.make_module(backbone, processor, steps=1, seed=0)
        measures.append(module.measures if validation else ())
    _check_callbacks(stages, measures, settings)
    base = checkpoint.base_of(backbone)
    facts = [[train.num_rows, train.fingerprint] for train, _ in rows]
    first, start_step = 0, 0
    lineage: list[dict[str, Any]] = []
    if resume and not (settings.last.exists() or (settings.run_dir / "model").exists()):
        log.info("%s has no checkpoint yet: the run begins anew", settings.run_dir)
    elif resume:
        state = checkpoint.read(settings.last)
        checkpoint.check_base(state, base, where=str(settings.last))
        _check_rows(stages, facts, state["cocoa"], settings)
        first, start_step = state["cocoa"]["stage_index"], state["global_step"]
        lineage = state["cocoa"]["lineage"]
        del state  # its weights are read once more by the trainer
    for index, stage in list(enumerate(stages))[first:]:
        position = {"stage": stage.name, "stage_index": index, "lineage": lineage}
        entry = _run_stage(
            stage,
            backbone,
            *rows[index],
            processor,
            settings,
            label=f"{index + 1}/{len(stages)} {stage.name}",
            position=position | {"base": base, "rows": facts},
            start_step=start_step,
        )
        lineage, start_step = [*lineage, entry], 0
    return lineage


def _check_rows(
    stages: Sequence[Stage], facts: list[Any], before: Mapping[str, Any], settings: RunSettings
) -> None:
    """Refuse to resume on training rows that are not those which the run was trained on."""
    start = before["stage_index"]  # what stages before it have read is learnt
    for stage, was, now in list(zip(stages, before.get("rows", facts), facts, strict=True))[start:]:
        if was != now:
            what = f"{was[0]} rows then, {now[0]} now"
            if was[0] == now[0]:
                what = "as many rows, of other content or in another order"
            raise UserError(
                f"the training data of stage {stage.name} changed since the run stopped ({what}), "
                "and a run goes on exactly or not at all: put the data back, or "
                + checkpoint.begin_another(settings.last)
            )


def _rows_of(stage: Stage, source: TrainingData) -> tuple[Pairs | PairStream, Pairs]:
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


def _check_callbacks(
    stages: Sequence[Stage], measures: Sequence[Sequence[str]], settings: RunSettings
) -> None:
    """Say which callbacks monitor what no stage logs under `validation/`, and refuse to export what
    none will keep.
    """
    callbacks, kept = settings.parts(stages[-1].name).callbacks, {"last"}
    for callback in callbacks:
        if not any(takes_part(callback, names) for names in measures):
            log.info(
                "%s does nothing: no stage of this run logs %s",
                type(callback).__name__,
                callback.monitor,  # type: ignore[attr-defined]
            )
        if isinstance(callback, ModelCheckpoint) and takes_part(callback, measures[-1]):
            kept.add(str(callback.filename))
    if settings.export not in kept:
        raise UserError(
            f"export={settings.export}: stage {stages[-1].name} keeps no such checkpoint, only "
            f"{', '.join(sorted(kept))}; one that is chosen by a metric needs validation data and "
            "a stage that logs it (conf/callbacks/default.yaml)"
        )


def _run_stage(
    stage: Stage,
    backbone: Backbone,
    train: Pairs | PairStream,
    validation: Pairs,
    processor: Processor,
    settings: RunSettings,
    *,
    label: str,
    position: dict[str, Any],
    start_step: int,
) -> dict[str, Any]:
    """Train one stage behind the `start_step` steps of the last checkpoint, and return its lineage
    entry.
    """
    steps = stage.count_steps(train.num_rows)
    seed = mix(settings.seed, position["stage_index"])
    L.seed_everything(seed % 2**32, verbose=False)  # new heads
    module = stage.make_module(backbone, processor, steps=steps, seed=seed)
    module.label = label
    saver = LastCheckpoint(settings.last, every=settings.checkpoint_every, position=position)
    metrics_csv = Metrics(settings.run_dir, stage.name, start_step=start_step, steps=steps)
    parts = settings.parts(stage.name)
    callbacks = [c for c in parts.callbacks if takes_part(c, module.measures)]
    parts = parts._replace(callbacks=[*callbacks, saver], loggers=[metrics_csv, *parts.loggers])
    trainer = make_trainer(parts, steps=steps, validate_every=stage.validate_every)
    backbone.compute_dtype = torch.float32 if trainer.precision == "32-true" else torch.bfloat16
    device = trainer.strategy.root_device
    data = StageData(
        train=train,
        validation=validation,
        make_samples=stage.make_samples,
        processor=processor,
        masking=module.masking,
        collator=module.collator(validating=False, device=device),
        validation_collator=module.collator(validating=True, device=device),
        mixing=stage.mixing,
        batch_size=stage.batch_size,
        validation_batch_size=stage.validation_batch_size,
        steps=steps,
        start_step=start_step,
        seed=seed,
        num_workers=settings.num_workers,
        on_bad_row=settings.on_bad_row,
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
            logger.log_hyperparams(dict(settings.config))
        trainer.fit(module, data, ckpt_path=settings.last if start_step else None)
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
        "seed": settings.seed,
        "validation": metrics,
        **({"matryoshka_dims": list(module.dims[:-1])} if len(module.dims) > 1 else {}),
    }


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
