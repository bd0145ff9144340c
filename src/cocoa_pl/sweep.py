"""A Hydra callback that gives a sweep (`-m`) a folder of its own, and its runs one summary."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from cocoa_pl.config.folders import claim_sweep
from cocoa_pl.config.process import guarded
from cocoa_pl.evaluation.compare import Run, read_sweep, write_summary
from cocoa_pl.evaluation.report import shown


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
        HydraConfig.instance().set_config(config)  # until a run has its own: `leave_sweep`
        sweeper = config.hydra.sweeper
        if sweeper.get("_target_", "").endswith("BasicSweeper"):  # others choose as they go
            params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            words = parser.parse_overrides([*params, *config.hydra.overrides.task])
            (runs,) = get_method(f"{sweeper._target_}.split_arguments")(words, max_batch_size=None)
            self.expected = [dict(word.lstrip("+").split("=", 1) for word in run) for run in runs]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN and self.subsets is not None:
            self._write(config, self.subsets)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.subsets is not None:
            console = Console() if sys.stdout.isatty() else Console(width=160)
            folder, table = self._write(config, self.subsets)
            console.print(table)
            said = f"summary: {folder}/summary.md and summary.csv, summary.png beside it"
            console.print(shown(said), soft_wrap=True)

    def _write(self, config: DictConfig, subsets: Sequence[str]) -> tuple[Path, Table]:
        """Of the runs in the sweep's folder, and those expected that left none."""
        folder = Path(config.hydra.runtime.cwd) / config.hydra.sweep.dir
        runs = read_sweep(folder)
        started = [run.overrides for run in runs]
        absent = [overrides for overrides in self.expected if overrides not in started]
        runs += [Run(folder, overrides, None, "not started") for overrides in absent]
        return folder, write_summary(folder, runs, subsets=subsets)
