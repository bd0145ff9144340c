"""`lightning.Trainer` for one stage: what the user configured, and what the recipe decides."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger

from cocoa_pl.distributed.strategies import TIMEOUT, FullySharded, Replicated
from cocoa_pl.errors import UserError, first_line
from cocoa_pl.stages.callbacks import StageProgress

# Arguments of `lightning.Trainer` that a stage cannot honour, and what does their work here. Their
# defaults are no request.
LENGTH = "a stage is as long as stage.NAME.steps or stage.NAME.epochs say"
VALIDATION = "a stage validates every stage.NAME.validate_every steps"
CLIPPING = "the norm of all ranks' gradients is bounded by stage.clip_norm"
NO_LOOP = "training has no such loop; evaluate.py scores models"
REFUSED = {
    "logger": "loggers are the config group logger=..., made anew for each stage",
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps"), LENGTH),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), VALIDATION),
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm"), CLIPPING),
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches"), NO_LOOP),
    "accumulate_grad_batches": "a step of stage.NAME.batch_size rows is cut into batches of "
    "stage.token_budget tokens, with exact sums over all of them",
    "overfit_batches": "stage.NAME.max_rows_per_subset=... trains on few rows",
    "enable_checkpointing": "resume= needs last.ckpt, written every checkpoint_every steps",
    "use_distributed_sampler": "every rank draws its own share of each batch",
    "reload_dataloaders_every_n_epochs": "a stage is one pass of its loader",
    "sync_batchnorm": "no model here has batch norms",
    "barebones": "it forbids the logger and the checkpoint that a run folder consists of",
    "default_root_dir": "the run folder is hydra.run.dir=...",
    "model_registry": "the run exports its model itself, into model/",
}
STRATEGIES = {"ddp": Replicated, "fsdp": FullySharded}


class Parts(NamedTuple):
    """What the config says of a stage's trainer, made anew for each stage: state of one `fit` must
    not reach the next.

    Attributes:
        dtype: `model.dtype`, which `precision=null` follows.
    """

    stage: str
    run_dir: Path
    dtype: str
    trainer: partial[L.Trainer]
    callbacks: list[L.Callback]
    loggers: list[Logger]


def make_trainer(parts: Parts, *, steps: int, validate_every: int) -> L.Trainer:
    """A stage's trainer.

    Args:
        steps: of the stage; `max_steps`, `limit_train_batches` and `fast_dev_run` make it shorter.

    Raises:
        UserError: for an argument that cannot be honoured, or whatever Lightning refuses.
    """
    asked = dict(parts.trainer.keywords)
    known = inspect.signature(L.Trainer).parameters
    for name, reason in REFUSED.items():
        default = known[name].default
        value = asked.pop(name, default)
        asks = value != default or isinstance(value, bool) != isinstance(default, bool)
        if asks and (name, value) != ("enable_checkpointing", True):
            raise UserError(f"trainer.{name}={value} cannot be honoured: {reason}")
    cap = asked.pop("limit_train_batches", None)
    cap = int(cap * steps) if isinstance(cap, float) else cap
    caps = [n for n in (asked.pop("max_steps", -1), cap) if n is not None and n >= 0]
    callbacks = asked.pop("callbacks", None) or []
    callbacks = [*(callbacks if isinstance(callbacks, list) else [callbacks]), *parts.callbacks]
    has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    shows_bar = asked.pop("enable_progress_bar", None) is not False and not has_bar
    for callback in callbacks:
        if isinstance(callback, StageProgress):
            callback.bar = shows_bar
    decided = {
        "precision": checked_precision(asked.get("precision"), parts.dtype),
        "max_steps": min([steps, *caps]),
        "max_epochs": -1,
        "val_check_interval": validate_every,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "enable_progress_bar": has_bar,
        "default_root_dir": parts.run_dir,
        "logger": parts.loggers,
        "callbacks": callbacks,
    }
    make, strategy = parts.trainer.func, asked.get("strategy", "auto")
    try:
        if strategy in STRATEGIES:
            decided["strategy"] = STRATEGIES[strategy](timeout=TIMEOUT)
        trainer = make(**asked | decided)
        if trainer.world_size > 1 and strategy == "auto":
            trainer = make(**asked | decided | {"strategy": Replicated(timeout=TIMEOUT)})
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        keys = [key for key in ("accelerator", "devices", "strategy") if key in asked]
        said = " ".join(f"trainer.{key}={asked[key]}" for key in keys)
        raise UserError(f"trainer: {first_line(error)} ({said})") from error
    if isinstance(asked.get("profiler"), str):  # it would show what it found on a log, silent here
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        profiler.dirpath, profiler.filename = parts.run_dir, f"profile-{parts.stage}"
    if trainer.world_size > 1 and not isinstance(trainer.strategy, Replicated | FullySharded):
        raise UserError(
            f"trainer.strategy={strategy} cannot be honoured: sums over several processes are "
            "exact with trainer=ddp, which adds gradients up once a step, or trainer=fsdp"
        )
    return trainer


def checked_precision(precision: Any, dtype: str) -> str:
    """What `lightning.Trainer` calls the type of matrix products: bf16-mixed or 32-true.

    Args:
        precision: as configured; None follows `dtype`, in which weights that do not train are kept.

    Raises:
        UserError: for another one.
    """
    if precision is None:
        return "32-true" if dtype == "float32" else "bf16-mixed"
    precision = {"bf16": "bf16-mixed", "32": "32-true"}.get(str(precision), str(precision))
    if precision == "32-true" and dtype != "float32":
        raise UserError(
            f"trainer.precision=32-true needs weights to match: model.dtype=float32, not {dtype}"
        )
    if precision not in ("bf16-mixed", "32-true"):
        raise UserError(
            f"trainer.precision={precision} cannot be honoured: matrix products are in bf16-mixed "
            "or 32-true, and weights that train are float32"
        )
    return precision
