"""`benchmark=mteb`: scores of tasks by mteb's own code."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cocoa_pl.config.bounds import Count
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError, extra
from cocoa_pl.evaluation.report import percent, plain_table, shown
from cocoa_pl.evaluation.results import Results, TaskScore
from cocoa_pl.evaluation.vectors import VectorSettings


class MtebBenchmark:
    """Tasks of mteb, by its own code and rules.

    Args:
        tasks: names that mteb knows, or `package.module.Class` of a task of one's own.
        suite: one of mteb's benchmarks instead, such as `MIEB(lite)`; null for none.
        model_name: `organization/model`, as results are filed.
        instructions: as in `CocoaEncoder`.
        training_datasets: as in `CocoaEncoder`, or one name; `mmeb` is `MMEB_TRAIN`.
        license: as in `CocoaEncoder`.
        results: folder where mteb keeps results, also of other models; what is in it is not
            computed again. null for one in the run's folder.
        batch_size: items that mteb's loaders decode together.

    Raises:
        UserError: without tasks, with both tasks and a suite, without mteb, or for a task that it
            does not know, or a model's name that it cannot file.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        suite: str | None,
        model_name: str,
        instructions: Mapping[str, str],
        training_datasets: Sequence[str] | str | None,
        license: str | None,
        results: str | None,
        batch_size: Count,
    ) -> None:
        if bool(tasks) == (suite is not None):
            raise UserError("give either benchmark.tasks=[NAME,...] or benchmark.suite=NAME")
        self.mteb = extra("mteb", of="mteb", wanted_by="benchmark=mteb")
        encoder = importlib.import_module("cocoa_pl.for_mteb.encoder")
        if model_name.count("/") != 1:
            raise UserError(f"mteb files models as organization/model, not {model_name}")
        self.tasks = _tasks(self.mteb, tasks, suite)
        self.suite = suite
        if training_datasets == "mmeb":
            training_datasets = encoder.MMEB_TRAIN
        elif isinstance(training_datasets, str):
            training_datasets = [training_datasets]
        self.encoder = partial(
            encoder.CocoaEncoder,
            name=model_name,
            instructions=instructions,
            training_datasets=training_datasets,
            license=license,
        )
        self.results = results
        self.batch_size = batch_size

    def score(
        self,
        embedder: Embedder,
        run_dir: Path,
        console: Console,
        *,
        path: str,
        vectors: VectorSettings,
    ) -> Results:
        """Run the tasks, write results.json and mteb's own files, show a table.

        Raises:
            UserError: for a score that is not a number.
        """
        model = self.encoder(embedder, batch_tokens=vectors.batch_tokens, threads=vectors.threads)
        described = {task.metadata.name: task.metadata for task in self.tasks}
        kept = self.results or run_dir / "mteb"
        found = self.mteb.evaluate(
            model,
            self.tasks,
            encode_kwargs={"batch_size": self.batch_size, "show_progress_bar": False},
            cache=self.mteb.ResultCache(kept),
            show_progress_bar=False,
        )
        tasks = []
        for result in found.task_results:
            name, score = result.task_name, float(result.get_score())
            if not math.isfinite(score):
                raise UserError(f"{name}: the score is {score}, which means nothing")
            tasks.append(TaskScore(name, described[name].type, described[name].main_score, score))
        meta = model.mteb_model_meta
        results = Results(
            benchmark=self.suite or "mteb",
            checkpoint=path,
            subsets=(),
            is_partial=True,
            tasks=tuple(tasks),
            about={
                "model": meta.name,
                "revision": meta.revision,
                "mteb_version": self.mteb.__version__,
            },
        )
        results.write_json(run_dir / "results.json")
        rows = [[task.name, task.metric, percent(task.score)] for task in tasks]
        console.print(plain_table("main scores in %", [["task", "metric", "score"], *rows]))
        for said in (f"every split and metric: {kept}", f"results: {run_dir / 'results.json'}"):
            console.print(shown(said), soft_wrap=True)
        return results


def _tasks(mteb: Any, names: Sequence[str], suite: str | None) -> list[Any]:
    try:
        if suite is not None:
            return list(mteb.get_benchmark(suite).tasks)
        return [_own(name) if "." in name else mteb.get_task(name) for name in names]
    except KeyError as error:
        raise UserError(str(error.args[0]).splitlines()[0].removeprefix("KeyError: ")) from error


def _own(name: str) -> Any:
    """A task by the place of its class."""
    module, _, task = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), task)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"there is no task {name}: {error}") from error
