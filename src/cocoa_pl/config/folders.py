"""Give each run a folder of its own, of one config and one model.

A default folder is made new, whatever else starts in the same second. A named one is a run's once
its config.yaml is there, which only one can make.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from cocoa_pl.config.process import is_first_process, started
from cocoa_pl.errors import UserError, quoted, typed
from cocoa_pl.stages.checkpoint import LAST

CONFIG, MODEL, RESULTS = "config.yaml", "model", "results.json"
TRAINED = (str(LAST), MODEL, "metrics.csv", RESULTS, "report.html")
SWEEP = "multirun.yaml"  # Hydra writes it


def run_folder(resumed: str | None, new: str) -> str:
    """The folder of a run: the one to resume, or a new one of this name once Hydra begins to run.

    Raises:
        UserError: if there is no run to resume, and as `new_folder`.
    """
    if resumed is not None:
        return str(run_of(resumed))
    if not HydraConfig.initialized():  # `--cfg`
        return new
    return str(new_folder(Path(new), "hydra.run.dir=runs/NAME (or resume=RUN)"))


def run_of(resumed: str) -> Path:
    """The run folder that `resume` names, by itself or by its last checkpoint.

    Raises:
        UserError: if there is no run.
    """
    folder = Path(resumed)
    if folder.match(str(LAST)):
        folder = folder.parents[1]
    if not (folder / CONFIG).is_file():
        raise UserError(f"resume={resumed}: there is no run (no {CONFIG}) in that folder")
    return folder


def new_folder(name: Path, way: str) -> Path:
    """Make a folder of this name, or of the first one behind it that is free: `_2`, `_3`, ...

    Raises:
        UserError: if torchrun or SLURM started several processes, each of which would make its own.
    """
    if started()[1] > 1:
        raise UserError(
            f"several processes were started from outside and must share one run folder; "
            f"give it as {way}"
        )
    folder, number = name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = name.with_name(f"{name.name}_{number}")


def claim_sweep(config: DictConfig) -> None:
    """Make the folder of a sweep, or take the one that was named, into Hydra's own part of its
    config, whose words each run is composed of.

    Raises:
        UserError: if the folder that was named holds another sweep.
    """
    words, folder = config.hydra.overrides.hydra, Path(config.hydra.sweep.dir)
    if not any(word.startswith("hydra.sweep.dir=") for word in words):
        folder = new_folder(folder, "hydra.sweep.dir=runs/NAME")
        config.hydra.sweep.dir = str(folder)
        words.append(f"hydra.sweep.dir={quoted(folder)}")
    elif is_first_process() and (folder / SWEEP).exists() and any(folder.glob("*/")):
        raise UserError(
            f"hydra.sweep.dir={folder} holds the runs of another sweep; name another folder"
        )


def leave_sweep() -> None:
    """Take away the folder of a sweep of which no run could be composed, and what Hydra left there
    but the user's own files.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        folder = Path(HydraConfig.get().sweep.dir)
        (folder / SWEEP).unlink(missing_ok=True)
        with suppress(OSError):  # there are such files
            folder.rmdir()


def check_free_for_run(folder: Path) -> None:
    """Refuse the folder of another run, before anything is written there."""
    if is_first_process() and _exists(folder, (CONFIG, *TRAINED)):
        raise UserError(
            f"{folder} holds a run already: {typed('resume', folder)} goes on with it, and a "
            "new run needs another folder (hydra.run.dir; hydra.sweep.subdir of a sweep)"
        )


def claim_for_scores(cfg: DictConfig, folder: Path) -> None:
    """Refuse a folder of other scores, and describe a new one by Hydra's own files. A killed
    evaluation may be repeated, and a run that has no scores yet may be given them.
    """
    if (folder / RESULTS).exists():
        raise UserError(f"hydra.run.dir={folder} holds scores already; name another folder")
    model = Path(cfg.ckpt).resolve()
    is_run = _exists(folder, (CONFIG, MODEL))
    if is_run and folder.resolve() not in (model, *model.parents):
        raise UserError(
            f"hydra.run.dir={folder} holds another run than {cfg.ckpt}; name a new folder"
        )
    if not is_run and is_first_process():
        save_words(cfg, folder)


@contextmanager
def claimed(cfg: DictConfig, run_dir: Path) -> Iterator[None]:
    """Within this a new run owns its folder, which Hydra's own files describe, and config.yaml,
    from which the run can be repeated and resumed.

    After a mistake before anything was trained, the same folder may be named again.

    Raises:
        UserError: if another run has the folder.
    """
    if is_first_process():
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        raw: Any = OmegaConf.to_container(cfg, resolve=False)
        # These refer to the folder, which may move, and to the stage at hand.
        plain |= {group: raw[group] for group in ("callbacks", "logger") if group in raw}
        try:
            with (run_dir / CONFIG).open("x", encoding="utf-8") as file:
                file.write(OmegaConf.to_yaml(plain))
        except FileExistsError:
            check_free_for_run(run_dir)
            raise
        save_words(cfg, run_dir)
    try:
        yield
    except (UserError, OSError):
        if is_first_process() and not _exists(run_dir, TRAINED):
            (run_dir / CONFIG).unlink()
        raise


def save_words(cfg: DictConfig, folder: Path) -> None:
    """Hydra's own files, which Hydra would write before it is known whose the folder is."""
    own, job = folder / ".hydra", HydraConfig.get()
    own.mkdir(exist_ok=True)
    OmegaConf.save(cfg, own / "config.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": job}), own / "hydra.yaml")
    OmegaConf.save(job.overrides.task, own / "overrides.yaml")


def hand_over(run_dir: Path, words: Sequence[str] = ()) -> None:
    """Let the other ranks, which Lightning starts with the words of this process, resume this run,
    with `words` for what may change of it: those of the process may be of a sweep, and the config
    of the run is in its folder.
    """
    sys.argv[1:] = [f"resume={quoted(run_dir)}", *words]
    job: Any = HydraConfig.get()
    with read_write(job):
        job.run.dir = quoted(run_dir)[1:-1]  # Lightning puts it in quotes


def _exists(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).exists() for name in names)
