"""`cocoa doctor`: check the data that a training run would read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import run_app
from cocoa_pl.config.saved import settled
from cocoa_pl.data.mmeb_eval import MmebBenchmark
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sources import HeldOutBenchmark, distinct_texts
from cocoa_pl.doctor.check_data import check_data
from cocoa_pl.doctor.findings import Findings
from cocoa_pl.doctor.reading import Reading, read
from cocoa_pl.doctor.report import print_report, write_json
from cocoa_pl.errors import UserError
from cocoa_pl.for_mteb.benchmark import MtebBenchmark
from cocoa_pl.models.loading import load_inputs
from cocoa_pl.run import build_stages, make_processors, model_folders
from cocoa_pl.stages.recipe import Stage

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
    findings = Findings()
    with console.status("reading rows"):
        stages = build_stages(cfg)
        data = build(cfg.data)
        benchmark = build(cfg.benchmark) if cfg.evaluate else None
        reading = _read(cfg, stages, data, benchmark, findings)
        processors, reason = _processors(cfg, reading)
    workers = os.cpu_count() or 1 if cfg.workers is None else cfg.workers
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console, transient=True) as progress:

        def watch(values: Iterable[Any], label: str, total: int) -> Iterable[Any]:
            if not console.is_terminal:  # a log shows no bars, but where a long check stands
                console.print(f"checking {label} ({total:,})", highlight=False)
            return progress.track(values, total, description=label)

        checked = check_data(
            reading,
            stages,
            findings,
            processors=processors,
            seed=cfg.seed,
            workers=workers,
            watch=watch,
        )
    not_checked = [reason] if reason else []
    if isinstance(benchmark, MtebBenchmark):
        not_checked.append("rows of the benchmark: mteb alone reads those of its tasks")
    print_report(console, checked, not_checked=not_checked)
    write_json(out / "doctor.json", checked, not_checked=not_checked)
    console.print(f"written: {out / 'doctor.json'}", soft_wrap=True, highlight=False)
    return WOULD_STOP if findings.stops_training else 0


def _read(
    cfg: DictConfig, stages: Sequence[Stage], data: Any, benchmark: Any, findings: Findings
) -> Reading:
    if isinstance(benchmark, HeldOutBenchmark | MtebBenchmark):
        benchmark = None  # the validation rows, which are read anyway, or rows that mteb reads
    scored = list(benchmark.table) if isinstance(benchmark, MmebBenchmark) else []
    return read(
        data,
        stages,
        benchmark,
        findings,
        data_pieces=lambda: _one_by_one(cfg.data, cfg.data.get("subsets") or []),
        benchmark_pieces=lambda: _one_by_one(cfg.benchmark, scored),
    )


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


def _processors(cfg: DictConfig, reading: Reading) -> tuple[list[Processor], str]:
    """Processors for training and for evaluation, or a sentence on why there are none.

    Raises:
        UserError: for a folder that was named and is none, or a model that is not supported.
    """
    if not any(len(source.train) for source in reading.sources):
        return [], "token lengths: there are no rows"
    texts = chain.from_iterable(source.train for source in reading.sources)
    try:
        folder, _ = model_folders(cfg, lambda: distinct_texts(texts))
    except UserError as error:
        if not isinstance(error.__cause__, OSError):  # not the network
            raise
        return [], f"token lengths: {error}"
    return make_processors(cfg, load_inputs(folder)), ""
