"""`cocoa doctor`: check the data that a training run would read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import run_app
from cocoa_pl.config.saved import settled
from cocoa_pl.data.mmeb_eval import MmebBenchmark
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sources import HeldOutBenchmark, distinct_texts
from cocoa_pl.doctor.check import Checkup
from cocoa_pl.doctor.report import facts_of, print_report
from cocoa_pl.errors import UserError
from cocoa_pl.for_mteb.benchmark import MtebBenchmark
from cocoa_pl.models.loading import load_inputs
from cocoa_pl.run import build_stages, make_processors, model_folders

WOULD_STOP = 1  # exit status: something would stop training


def run(words: Sequence[str], console: Console) -> int:
    """Run the command line's words; the exit status is 1 if something would stop training."""
    return run_app("doctor", lambda cfg: check(settled(cfg), console), words)


def check(cfg: DictConfig, console: Console) -> int:
    """Check the data that `python train.py` with this config would read.

    Returns:
        1 if anything would stop training under `on_bad_row=fail`, else 0.

    Raises:
        UserError: for a mistake in the config.
    """
    # Bad rows are reported and left out, so that one does not hide the next.
    for node in (cfg, cfg.data, cfg.benchmark):
        if "on_bad_row" in node:
            node.on_bad_row = "skip"
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)  # refused before the work, not after
    workers = cfg.workers
    if workers is None:  # of the cores, those that this process may use, where the system says so
        is_told = sys.platform == "linux"
        workers = len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console, transient=True) as progress:

        def watch(values: Iterable[Any], label: str, total: int) -> Iterable[Any]:
            if not console.is_terminal:  # a log shows no bars, but where a long check stands
                console.print(f"checking {label} ({total:,})", highlight=False)
            return progress.track(values, total, description=label)

        checkup = Checkup(build_stages(cfg), cfg.seed, workers, watch)
        names = cfg.data.get("subsets") or []
        checkup.read_training(build(cfg.data), _one_by_one(cfg.data, names))
        benchmark = build(cfg.benchmark) if cfg.evaluate else None
        # The validation rows are read anyway; mteb alone reads those of its tasks.
        if benchmark is not None and not isinstance(benchmark, HeldOutBenchmark | MtebBenchmark):
            names = list(benchmark.table) if isinstance(benchmark, MmebBenchmark) else []
            checkup.read_benchmark(benchmark.name, _one_by_one(cfg.benchmark, names) or [benchmark])
        processors, reason = _processors(cfg, checkup)
        checkup.check(processors)
    not_checked = [reason] if reason else []
    if isinstance(benchmark, MtebBenchmark):
        not_checked.append("rows of the benchmark: mteb alone reads those of its tasks")
    facts = facts_of(checkup, not_checked)
    print_report(console, facts)
    file = out / "doctor.json"
    content = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    # What is no Unicode, such as a half of a pair in a file's name, becomes an escape of JSON.
    file.write_text(content, encoding="utf-8", errors="backslashreplace")
    console.print(f"written: {file}", soft_wrap=True, highlight=False)
    return WOULD_STOP if facts["stops_training"] else 0


def _one_by_one(node: DictConfig, names: Sequence[str]) -> list[Any]:
    """What the config builds, for each of these subsets alone.

    Lists and mappings whose entries are all subsets (`caption_subsets`, `table`) are cut, too.
    """
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    made = []
    for name in names:
        alone = {**content, "subsets": [name]}
        for key, value in content.items():
            if isinstance(value, list) and all(entry in names for entry in value):
                alone[key] = [entry for entry in value if entry == name]
            elif isinstance(value, dict) and set(value) <= set(names):
                alone[key] = {entry: about for entry, about in value.items() if entry == name}
        made.append(build(alone))
    return made


def _processors(cfg: DictConfig, checkup: Checkup) -> tuple[list[Processor], str]:
    """Processors for training and for evaluation, or a sentence on why there are none.

    Raises:
        UserError: for a folder that was named and is none, or a model that is not supported.
    """
    pairs = Pairs.joined([source.train for source in checkup.sources])
    if not pairs:
        return [], "token lengths: there are no rows"
    try:
        folder, _ = model_folders(cfg, lambda: distinct_texts(pairs))
    except UserError as error:
        if not isinstance(error.__cause__, OSError):  # not the network
            raise
        return [], f"token lengths: {error}"
    return make_processors(cfg, load_inputs(folder)), ""
