"""A Hydra callback that gives a sweep (`-m`) a folder of its own, and its runs one summary: table,
summary.csv, .md and .png.

In a config:

    hydra:
      callbacks:
        summary:
          _target_: cocoa_pl.sweep.SweepSummary
          subsets: [scene_i2t, scene_t2i]
"""

import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from cocoa_pl.config.folders import claim_sweep
from cocoa_pl.config.process import guarded
from cocoa_pl.evaluation.summary import Run, read_runs, write_summary

logger = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Writes the summary after every run, so that an interrupted sweep has one, and prints it last.

    Hydra raises at the first failed run and then never reaches `on_multirun_end`; the files on disk
    list that run as missing.

    Args:
        subsets: in the table, beside the overall score; None for no summary.
    """

    def __init__(self, *, subsets: Sequence[str] | None) -> None:
        self.subsets = subsets
        self.expected: list[dict[str, str]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if status := guarded(lambda: claim_sweep(config)):
            sys.exit(status)  # an error would be Hydra's warning
        self.expected = expected_overrides(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN or self.subsets is None:
            return
        self._write(config)
        if job_return.status is JobStatus.FAILED:
            where = _folder(config) / "summary.md"
            logger.warning("run %s failed; %s lists it as missing", config.hydra.job.num, where)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.subsets is None:
            return
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(self._write(config))
        where = _folder(config) / "summary.md"
        console.print(f"summary: {where} and summary.csv, summary.png beside it")

    def _write(self, config: DictConfig) -> Table:
        """Of the runs in the sweep's folder, and those expected that left none."""
        folder, subsets = _folder(config), self.subsets or ()
        runs = read_runs(folder, subsets=subsets)
        started = [run.overrides for run in runs]
        absent = [overrides for overrides in self.expected if overrides not in started]
        runs += [Run(folder, overrides, {}, "not started") for overrides in absent]
        return write_summary(folder, runs, subsets=subsets)


def expected_overrides(config: DictConfig) -> list[dict[str, str]]:
    """The overrides of every run of the sweep; empty for sweepers that choose as they go."""
    sweeper = config.hydra.sweeper
    if not sweeper.get("_target_", "").endswith("BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    values = {}  # the last word on a key counts
    for word in parser.parse_overrides([*params, *config.hydra.overrides.task]):
        values[word.get_key_element().lstrip("+")] = (
            list(word.sweep_string_iterator())
            if word.is_sweep_override()
            else [word.get_value_element_as_str()]
        )
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


def _folder(config: DictConfig) -> Path:
    return Path(config.hydra.runtime.cwd) / config.hydra.sweep.dir
