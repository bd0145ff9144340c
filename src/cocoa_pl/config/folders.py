"""Give each run a folder of its own, of one config and one model.

A default folder is made new, whatever else starts in the same second. A named one is a run's once
its config.yaml is there, which only one can make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cocoa_pl.config.command_line import add_override
from cocoa_pl.config.process import check_named, is_first_process
from cocoa_pl.errors import UserError
from cocoa_pl.stages.checkpoint import LAST

CONFIG, MODEL, RESULTS = "config.yaml", "model", "results.json"
TRAINED = (str(LAST), MODEL, "metrics.csv", RESULTS, "report.html")
SWEEP = "multirun.yaml"  # Hydra writes it


def give_folder(config: DictConfig, *, way: str, scored: str | None = None) -> None:
    """Find out where a command writes before Hydra writes there, and tell Hydra by one more word.

    Args:
        config: with Hydra's own part.
        way: how to name a folder.
        scored: the model, of a command that scores one; None for one that trains.

    Raises:
        UserError: if the folder that was named holds another run, or sweep, or other scores; or if
            torchrun or SLURM started several processes and none was named.
    """
    if scored is None and config.resume is not None:
        return
    sweeps = config.hydra.mode == RunMode.MULTIRUN
    key = "hydra.sweep.dir" if sweeps else "hydra.run.dir"
    HydraConfig.instance().set_config(config)  # a folder may be named by what Hydra knows
    folder = Path(str(OmegaConf.select(config, key)))
    if not any(o.startswith(f"{key}=") for o in config.hydra.overrides.hydra):
        if not sweeps:
            check_named(way)
        folder = new_folder(folder)
    elif scored is not None and not sweeps:
        _check_free_for_scores(folder, scored)
    elif is_first_process():
        (_claim_sweep if sweeps else _check_free_for_run)(folder)
    quoted = str(folder).replace("\\", "\\\\").replace("'", r"\'")
    add_override(f"{key}='{quoted}'")


def new_folder(name: Path) -> Path:
    """Make a folder of this name, or of the first one behind it that is free: `_2`, `_3`, ..."""
    name.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = name if number == 1 else name.with_name(f"{name.name}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("numbers do not end")


@contextmanager
def claimed(cfg: DictConfig, run_dir: Path, job: Any) -> Iterator[None]:
    """Within this a new run owns its folder, which config.yaml and Hydra's own files describe.

    After a mistake before anything was trained, the same folder may be named again.

    Args:
        job: Hydra's own config.

    Raises:
        UserError: if another run has the folder.
    """
    if is_first_process():
        save_config(cfg, run_dir)
        own = run_dir / ".hydra"
        own.mkdir(exist_ok=True)
        OmegaConf.save(cfg, own / "config.yaml")
        OmegaConf.save(OmegaConf.create({"hydra": job}), own / "hydra.yaml")
        OmegaConf.save(job.overrides.task, own / "overrides.yaml")
    try:
        yield
    except UserError:
        if is_first_process() and not _exists(run_dir, TRAINED):
            (run_dir / CONFIG).unlink()
        raise


def save_config(cfg: DictConfig, run_dir: Path) -> None:
    """The resolved config, from which the run can be repeated and resumed; it makes the folder the
    run's.

    Raises:
        UserError: if there is one already.
    """
    text = OmegaConf.to_yaml(cfg, resolve=True)
    try:
        with (run_dir / CONFIG).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(
            f"{run_dir} holds a run already; a new run needs another folder, and each run of a "
            "sweep its own (hydra.sweep.subdir)"
        ) from None


def _check_free_for_run(folder: Path) -> None:
    if _exists(folder, (CONFIG, *TRAINED)):
        raise UserError(
            f"hydra.run.dir={folder} holds a run already: resume={folder} goes on with it, and a "
            "new run needs another folder"
        )


def _claim_sweep(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / SWEEP).touch(exist_ok=False)
    except FileExistsError:
        raise UserError(
            f"hydra.sweep.dir={folder} holds the runs of another sweep; name another folder"
        ) from None


def _check_free_for_scores(folder: Path, scored: str) -> None:
    """A killed evaluation may be repeated, and a run that has no scores yet may be given them."""
    if (folder / RESULTS).exists():
        raise UserError(f"hydra.run.dir={folder} holds scores already; name another folder")
    if not _exists(folder, (CONFIG, MODEL)):
        return
    if folder.resolve() not in (Path(scored).resolve(), *Path(scored).resolve().parents):
        raise UserError(
            f"hydra.run.dir={folder} holds another run than {scored}; name a new folder"
        )
    add_override("hydra.output_subdir=null")  # `.hydra` there is the training run's


def _exists(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).exists() for name in names)
