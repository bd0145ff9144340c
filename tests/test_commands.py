"""`train.py` and `evaluate.py` as they are typed, on a very small model and few scenes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from omegaconf import OmegaConf

from cocoa_pl.cli import run as cocoa
from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.errors import UserError
from cocoa_pl.run import open_embedder
from tests.files import write_rows
from tests.processes import run_script
from tests.small import SMALL_BENCHMARK, SMALL_DIGITS, SMALL_TRAINING, STAGES

ROOT = CONFIGS.parent


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def small(trained: Path) -> list[str]:
    """Overrides that leave of everything as little as works."""
    return [f"cache_dir={trained / '.cache'}", *SMALL_DIGITS, *SMALL_BENCHMARK, *SMALL_TRAINING]


@pytest.fixture(scope="module")
def scored(small: list[str]) -> list[str]:
    """Those of a benchmark alone."""
    return [override for override in small if override.startswith(("cache_dir", "benchmark"))]


def command(script: str, *arguments: str, cwd: Path) -> Ended:
    """As a shell runs it."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same in this process, which has everything imported."""

    def in_process(script: str, *arguments: str) -> Ended:
        monkeypatch.chdir(tmp_path)
        status = run_script(ROOT / script, arguments, monkeypatch)
        return Ended(status, *capsys.readouterr())

    return in_process


@pytest.fixture(scope="module")
def finished(trained: Path) -> tuple[Path, Ended]:
    """The whole recipe in a process of its own: its run folder, and its output."""
    return trained / "runs/A", Ended(0, *((trained / to).read_text() for to in ("out", "err")))


def scores(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {name: subset["precision_at_1"] for name, subset in content["subsets"].items()}


def test_a_run_leaves_everything_it_promises(finished: tuple[Path, Ended]) -> None:
    folder, _ = finished
    for name in (
        "config.yaml",
        "checkpoints/last.ckpt",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/preprocessor_config.json",
        "model/cocoa.json",
        "metrics.csv",
        "results.json",
        "report.html",
        "log.txt",
        "pictures/warmup_images.png",
        "pictures/reconstruct_text.md",
        "pictures/contrast_similarity.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    lineage = json.loads((folder / "model" / "cocoa.json").read_text())["lineage"]
    assert [entry["stage"] for entry in lineage] == list(STAGES)
    assert not (folder / "summary.md").exists()  # of a sweep
    # All but what is filled in for each stage has its value.
    assert "${" not in (folder / "config.yaml").read_text().replace("${run.", "")


def test_a_run_logs_what_it_does(finished: tuple[Path, Ended]) -> None:
    _, ended = finished
    assert "parameters train" in ended.out
    for number, stage in enumerate(STAGES, start=1):
        assert f"{number}/4 {stage} 2/2 loss " in ended.out
        assert f"{number}/4 {stage} done; validation: " in ended.out
    assert "bridge gain" in ended.out
    assert "scene_i2t" in ended.out
    assert ended.out.splitlines()[-1] == "report: runs/A/report.html"
    assert ended.err == ""


@pytest.mark.parametrize("part", ["", "checkpoints/last.ckpt"], ids=["run", "checkpoint"])
def test_evaluating_a_run_or_its_checkpoint_gives_its_scores(
    part: str, finished: tuple[Path, Ended], scored: list[str], run: Run, tmp_path: Path
) -> None:
    ended = run("evaluate.py", f"ckpt={finished[0] / part}", *scored, "hydra.run.dir=scored")
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1] == "report: scored/report.html"
    assert scores(tmp_path / "scored") == scores(finished[0])
    assert "loss" in (tmp_path / "scored" / "report.html").read_text()  # of the run


def test_a_model_is_scored_at_the_widths_it_was_trained_for(
    finished: tuple[Path, Ended], small: list[str], scored: list[str], run: Run, tmp_path: Path
) -> None:
    """Its run's config tells them, and `cocoa.json` where it has left its run."""
    given = [o for o in small if "stage." not in o or "contrast" in o]
    trained = ("stage=contrast", "stage.contrast.module.matryoshka_dims=[8]")
    from_run = f"init_from={finished[0]}"
    ended = run("train.py", *given, *trained, from_run, "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    shutil.copytree(tmp_path / "run/model", tmp_path / "model")
    found = [json.loads((tmp_path / "run/results.json").read_text())["widths"]]
    for place in ("model", "run/checkpoints/last.ckpt"):
        ended = run("evaluate.py", f"ckpt={place}", *scored, f"hydra.run.dir=scored/{place}")
        assert ended.status == 0, ended.err
        content = json.loads((tmp_path / "scored" / place / "results.json").read_text())
        found.append(content["widths"])
        assert all(subset["widths"].keys() == {"8"} for subset in content["subsets"].values())
    assert found[0].keys() == {"8"}
    assert found[0] == found[1] == found[2]
    assert "Shorter vectors" in (tmp_path / "scored/model/report.html").read_text()


def test_a_damaged_config_is_told_before_anything_is_embedded(
    finished: tuple[Path, Ended], scored: list[str], tmp_path: Path, run: Run
) -> None:
    shutil.copytree(finished[0] / "model", tmp_path / "damaged" / "model")
    (tmp_path / "damaged" / "config.yaml").write_text("seed: [")
    ended = run("evaluate.py", "ckpt=damaged", "hydra.run.dir=scored", "store=vectors", *scored)
    assert ended.status == 2
    assert "damaged/config.yaml is damaged" in ended.err
    assert not (tmp_path / "scored" / "results.json").exists()
    assert not (tmp_path / "vectors").exists()


def test_a_checkpoint_opens_with_a_kernel_that_runs_here(
    finished: tuple[Path, Ended], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("kernel: auto", "kernel: varlen"))
    embedder = open_embedder(str(run_dir / "checkpoints" / "last.ckpt"), device="cpu")
    expected = open_embedder(str(finished[0]), device="cpu").encode(["two"])
    np.testing.assert_allclose(embedder.encode(["two"]), expected, atol=1e-6)


def test_resuming_a_finished_run_scores_it_again(
    finished: tuple[Path, Ended], run: Run, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / "results.json").unlink()
    (tmp_path / "copy" / "model" / "notes.txt").write_text("mine")
    ended = run("train.py", "resume=copy")
    assert ended.status == 0, ended.err
    assert (tmp_path / "copy" / "model" / "notes.txt").read_text() == "mine"
    (tmp_path / "copy" / "model" / "config.json").write_text("{}")
    assert "config.json was changed" in run("train.py", "resume=copy").err
    assert scores(tmp_path / "copy") == scores(finished[0])
    assert "pretrain" not in ended.out
    lineages = [
        json.loads((folder / "model" / "cocoa.json").read_text())["lineage"]
        for folder in (tmp_path / "copy", finished[0])
    ]
    assert lineages[0] == lineages[1]


def test_a_stage_starts_from_an_earlier_run(
    finished: tuple[Path, Ended], small: list[str], run: Run, tmp_path: Path
) -> None:
    ended = run(
        "train.py",
        *(o for o in small if not o.startswith("stage.") or "contrast" in o),
        f"init_from={finished[0]}",
        "stage=contrast",
        "adapter=lora",
        "evaluate=false",
        "hydra.run.dir=more",
    )
    assert ended.status == 0, ended.err
    assert f"starting from {finished[0] / 'model'}" in ended.out
    assert f"rates are those of {finished[0] / 'model' / 'cocoa.json'}" in ended.out
    written = OmegaConf.load(tmp_path / "more" / "config.yaml")
    first = OmegaConf.load(finished[0] / "config.yaml")
    assert {**written.stage, "order": 0} == {**first.stage, "order": 0}
    assert written == OmegaConf.load(tmp_path / "more" / ".hydra" / "config.yaml")
    lineage = json.loads((tmp_path / "more" / "model" / "cocoa.json").read_text())["lineage"]
    assert [entry["stage"] for entry in lineage] == [*STAGES, "contrast"]
    assert not (tmp_path / "more" / "results.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train.py init_from=folder", "folder"),
        ("train.py init_from=stopped", "resume="),
        (
            "train.py experiment=paper_qwen2vl_2b",
            "benchmark.root has no value; give it as benchmark",
        ),
        (
            "train.py data=pairs data.image_root=. evaluate=false data.path=bad.jsonl",
            "bad.jsonl line 1, query: ",
        ),
        ("evaluate.py", "say which model to score"),
        ("evaluate.py ckpt=./none", "./none is no model folder"),
        ("evaluate.py ckpt=none.ckpt", "no checkpoint none.ckpt"),
        ("evaluate.py ckpt=stopped", "resume=stopped finishes it"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_two(
    words: str, message: str, run: Run, tmp_path: Path
) -> None:
    rows = [{"query_image": "none.png", "positive": f"caption {number}"} for number in range(8)]
    write_rows(tmp_path / "bad.jsonl", rows)
    for name in ("folder", "stopped"):
        (tmp_path / name).mkdir()
    (tmp_path / "stopped" / "config.yaml").write_text("seed: 0\n")
    ended = run(*words.split())
    assert ended.status == 2, ended.err
    assert message in ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert "Traceback" not in ended.err + ended.out


@pytest.mark.slow
def test_two_processes_started_by_the_trainer_end_as_one_run(
    small: list[str], tmp_path: Path
) -> None:
    given = [o for o in small if o != "trainer=cpu"]
    ended = command(
        "train.py",
        *given,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    assert ended.status == 0, ended.err
    assert scores(tmp_path / "run")
    assert ended.err == ""
    for line in ("parameters train", "4/4 contrast done", "report: run/report.html"):
        assert ended.out.count(line) == 1, line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_the_other_process_of_a_sweeps_run_ends_with_it(small: list[str], tmp_path: Path) -> None:
    """Lightning starts it with the words of the first, which began another sweep."""
    ended = command(
        *("train.py", "-m", *(o for o in small if o != "trainer=cpu"), "stage=contrast"),
        *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "seed=0,1"),
        "hydra.sweep.dir='my sweep, ü'",
        cwd=tmp_path,
    )
    assert (ended.status, ended.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["my sweep, ü"]
    assert ended.out.count("summary: ") == 1
    assert "| as configured | 2 |" in (tmp_path / "my sweep, ü" / "summary.md").read_text()
    for number in "01":
        assert scores(tmp_path / "my sweep, ü" / number)


def test_a_finished_run_is_exported_without_what_it_began_with(
    finished: tuple[Path, Ended], tmp_path: Path
) -> None:
    """What was scored is handed over; a checkpoint is opened where it is named."""
    moved = Path(shutil.copytree(finished[0], tmp_path / "moved"))
    checkpoint = moved / "checkpoints/last.ckpt"
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace("init_from: null", "init_from: no/longer/here"))
    with pytest.raises(UserError, match=r"no/longer/here .* stands alone: .*/moved/model"):
        open_embedder(str(checkpoint), device="cpu")
    checkpoint.unlink()
    assert cocoa(["export", str(moved), "--to", "hf"]) == 0
    whole = finished[0] / "checkpoints/last.ckpt"
    assert cocoa(["export", str(whole), "--to", "hf", "--out", str(tmp_path / "other")]) == 0
    first, second, third = (
        open_embedder(str(path), device="cpu").encode(["a seven"])
        for path in (finished[0], moved / "hf", tmp_path / "other")
    )
    assert (first == second).all()
    assert abs(first - third).max() < 1e-6
    kept, again, other = (
        json.loads((folder / "cocoa.json").read_text())
        for folder in (finished[0] / "model", moved / "hf", tmp_path / "other")
    )
    assert kept["lineage"] == again["lineage"]
    assert kept["settings"] == again["settings"] == other["settings"]
    assert kept["settings"]["model"]["eval_max_pixels"] == 12544
    assert "source" not in kept["settings"]["model"]
