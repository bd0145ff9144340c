"""Run folders: their overrides, configs and scores, or why they have none."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import MEANS, read_results

SEED = "seed"


@dataclass(frozen=True)
class Run:
    """A run folder, what was overridden for it and, unless `missing` says why not, its scores."""

    folder: Path
    overrides: dict[str, str]
    scores: dict[str, float]
    groups: tuple[str, ...]
    missing: str

    @property
    def variant(self) -> dict[str, str]:
        """The overrides that tell configurations apart: all but the seed."""
        return {key: value for key, value in self.overrides.items() if key != SEED}


def find_runs(sweep: Path) -> list[Path]:
    """The run folders below a sweep folder, those named by a number in its order."""
    folders = {path.parent.parent for path in sweep.rglob(".hydra/overrides.yaml")}
    return sorted(folders, key=lambda f: (not f.name.isdigit(), f.name.zfill(9), str(f)))


def collect(folders: Iterable[Path]) -> list[Run]:
    """Read each run's `.hydra/overrides.yaml` and results.json."""
    return [_read_run(Path(folder)) for folder in folders]


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run saved; empty for a folder without one.

    Raises:
        UserError: if it is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def missing_run(overrides: Iterable[str], *, folder: Path, why: str) -> Run:
    """A run that is known of but left no results; overrides are `key=value`."""
    return Run(folder, parse_overrides(overrides), scores={}, groups=(), missing=why)


def parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """`["+a=1", "seed=2"]` as `{"a": "1", "seed": "2"}`; settings of hydra itself are left out."""
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs if not key.startswith(("hydra.", "hydra/"))}


def _read_run(folder: Path) -> Run:
    overrides_file, results_file = folder / ".hydra" / "overrides.yaml", folder / "results.json"
    if not overrides_file.is_file():
        return missing_run((), folder=folder, why=f"no .hydra/overrides.yaml in {folder.name}")
    try:
        overrides = yaml.safe_load(overrides_file.read_text(encoding="utf-8")) or []
        if not results_file.is_file():
            return missing_run(overrides, folder=folder, why=f"no results.json in {folder.name}")
        results = read_results(results_file)
    except yaml.YAMLError:
        return missing_run((), folder=folder, why=f"overrides.yaml in {folder.name} is damaged")
    except UserError as error:
        return missing_run(overrides, folder=folder, why=str(error))
    tasks = {name: task["main_score"] for name, task in results.get("tasks", {}).items()}
    groups = {**results["groups"], **tasks}
    subsets = {name: subset["precision_at_1"] for name, subset in results["subsets"].items()}
    scores = {**{name: results[name] for name in MEANS}, **groups, **subsets}
    present = {name: score for name, score in scores.items() if score is not None}
    return Run(folder, parse_overrides(overrides), present, tuple(groups), missing="")
