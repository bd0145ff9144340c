"""Loss curves of the recipe on digits do not change with the ways of computing them faster.

Once against the curve of the code before any of it (`digits_curve.csv`), and for each way of saving
work against the run without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cocoa_pl.run import train
from tests.configs import composed
from tests.files import Metrics, read_metrics
from tests.small import STAGES

RECORDED = Path(__file__).parent / "digits_curve.csv"
SHORT = [
    *(f"stage.{stage}.{key}" for stage in STAGES for key in ("steps=3", "batch_size=8")),
    *(f"stage.{s}.optimization.{key}" for s in STAGES for key in ("warmup_steps=2", "lr=5e-4")),
    *("stage.validate_every=3", "stage.validation_batch_size=12"),
    *("data.scenes=1000", "data.task_rows=60", "data.validation_rows=30"),
    *("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "logger=none", "evaluate=false"),
]
PLAIN = ["stage.token_budget=100000", "stage.contrast.module.similarity_block=100000"]

Run = Callable[..., Metrics]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The recipe for a few steps, and what it logged."""
    cache = tmp_path_factory.mktemp("cache")

    def once(*overrides: str) -> Metrics:
        folder = tmp_path_factory.mktemp("run")
        train(composed(*SHORT, f"cache_dir={cache}", *overrides), folder, Console(quiet=True))
        return read_metrics(folder / "metrics.csv")

    return once


def assert_same(found: Metrics, wanted: Metrics, *, relative: float) -> None:
    assert found.keys() == wanted.keys()
    for place, value in wanted.items():
        assert math.isclose(found[place], value, rel_tol=relative, abs_tol=relative), (
            f"{place}: {found[place]} is not {value}"
        )


def test_the_curve_is_that_of_the_code_before(run: Run) -> None:
    found, wanted = run(), read_metrics(RECORDED)
    assert len(wanted) > 70
    assert {stage for stage, _, _ in wanted} == set(STAGES)
    assert_same(found, wanted, relative=5e-4)


@pytest.fixture(scope="module")
def plain(run: Run) -> Metrics:
    """One chunk a step, one table of similarities: nothing is cut, cached or shared."""
    return run(*PLAIN)


@pytest.mark.slow
def test_savings_change_no_number(run: Run, plain: Metrics) -> None:
    """Small chunks, similarities by blocks, workers, and recomputed blocks, all at once."""
    saving = [
        *("stage.token_budget=70", "stage.contrast.module.similarity_block=5"),
        *("num_workers=2", "model.gradient_checkpointing=true"),
    ]
    assert_same(run(*saving), plain, relative=1e-4)


@pytest.mark.slow
def test_another_seed_gives_another_curve(run: Run, plain: Metrics) -> None:
    """The comparisons above can fail."""
    other = run(*PLAIN, "seed=1")
    first = ("contrast", 0, "train/loss")
    assert abs(other[first] - plain[first]) > 1e-2 * plain[first]
