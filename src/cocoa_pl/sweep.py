"""A Hydra callback that turns the runs of `-m` into one summary: table, summary.csv, .md and .png.

In a config:

    hydra:
      callbacks:
        summary:
          _target_: cocoa_pl.sweep.SweepSummary
          subsets: [scene_i2t, scene_t2i]
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from cocoa_pl.evaluation.summary import (
    Run,
    collect,
    find_runs,
    missing_run,
    parse_overrides,
    write_summary,
)

logger = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Writes the summary after every run, so that an interrupted sweep has one, and prints it last.

    Hydra raises at the first failed run and then never reaches `on_multirun_end`; the files on disk
    list that run as missing.
    """

    def __init__(self, *, subsets: Sequence[str]) -> None:
        self.subsets = list(subsets)
        self.expected: list[list[str]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.expected = expected_overrides(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = _sweep_folder(config)
        self._write(folder)
        if job_return.status is JobStatus.FAILED:
            logger.warning(
                "run %s failed; %s lists it as missing", config.hydra.job.num, folder / "summary.md"
            )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = _sweep_folder(config)
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(self._write(folder))
        console.print(f"summary: {folder / 'summary.md'} and summary.csv, summary.png beside it")

    def _write(self, folder: Path) -> Table:
        return write_summary(folder, sweep_runs(folder, self.expected), subsets=self.subsets)


def sweep_runs(folder: Path, expected: Sequence[Sequence[str]]) -> list[Run]:
    """The runs found below a sweep folder, and as missing those expected that left no folder."""
    runs = collect(find_runs(folder))
    started = [run.overrides for run in runs]
    return runs + [
        missing_run(overrides, folder=folder, why="not started")
        for overrides in expected
        if parse_overrides(overrides) not in started
    ]


def expected_overrides(config: DictConfig) -> list[list[str]]:
    """The overrides of every run of the sweep; empty for sweepers that choose as they go."""
    sweeper = config.hydra.sweeper
    if not sweeper.get("_target_", "").endswith("BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    return [
        overrides
        for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None)
        for overrides in batch
    ]


def _sweep_folder(config: DictConfig) -> Path:
    return Path(config.hydra.runtime.cwd) / config.hydra.sweep.dir
