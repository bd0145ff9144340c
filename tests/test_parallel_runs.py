"""The three stages on 1, 2 and 4 processes, with replicated and with sharded parameters: the same
losses and the same weights.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from cocoa_pl.data.batch import Batch
from cocoa_pl.distributed.collectives import rank
from cocoa_pl.errors import UserError
from cocoa_pl.run import train
from cocoa_pl.stages.checkpoint import read, read_chosen, read_weights
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.recipe import Interrupted
from tests.configs import composed
from tests.files import Metrics, read_metrics, write_rows
from tests.processes import start_ranks

STAGES = ("warmup", "reconstruct", "contrast")
TUNINGS = {
    "full": ["adapter=none"],
    "dora": ["adapter=dora", "adapter.dropout=0", "model.gradient_checkpointing=true"],
}
# Parts that never get a gradient: an untied vocabulary head in contrast, the vision tower on texts.
UNUSED = {
    "untied": ["adapter=none", "stage.order=[contrast]"],
    "texts": ["adapter=lora", "adapter.dropout=0", "stage.order=[contrast]"],
}
MORE = {  # adapters without DoRA; windows in the vision tower; DeepStack
    "lora": ["adapter=lora", "adapter.dropout=0"],
    "qwen25vl": ["init_from=null", "model=tiny_qwen25vl"],
    "qwen3vl": ["init_from=null", "model=tiny_qwen3vl"],
}
STRATEGIES = ("ddp", "fsdp")
LR = 1e-3
STOP_AT = 2  # step of contrast after which one rank gets SIGTERM


@dataclass(frozen=True)
class Job:
    """One call of `train`."""

    config: Path
    run_dir: Path
    resume: bool = False
    stopped: bool = False


def run(job: Job) -> None:
    """The whole of `train.py` but its command line."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    cfg = OmegaConf.load(job.config)
    assert isinstance(cfg, DictConfig)
    cfg.resume = str(job.run_dir) if job.resume else None
    train(cfg, job.run_dir, Console(quiet=True))


def run_and_stop(job: Job) -> None:
    """As if the cluster wanted one of the machines back."""
    original = ContrastiveModule.training_step

    def step(self: ContrastiveModule, batches: list[Batch], batch_idx: int) -> None:
        original(self, batches, batch_idx)
        if self.global_step == STOP_AT and rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    ContrastiveModule.training_step = step  # type: ignore[method-assign]
    try:
        with pytest.raises(Interrupted, match=f"contrast at step {STOP_AT} of 5"):
            run(job)
    finally:
        ContrastiveModule.training_step = original  # type: ignore[method-assign]


def work(index: int, jobs: list[Job]) -> None:
    """One of the processes."""
    # For Lightning: the processes are there already, and know each other.
    world = str(dist.get_world_size())
    os.environ |= {"LOCAL_RANK": str(index), "NODE_RANK": "0", "WORLD_SIZE": world}
    for job in jobs:
        run_and_stop(job) if job.stopped else run(job)


@pytest.fixture(scope="module")
def compose_run(
    tiny_folder: Path,
    untied_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_image: Callable[..., Image.Image],
) -> Callable[..., Path]:
    """Writes the config of a run on 24 pairs, every third without an image."""
    folder = tmp_path_factory.mktemp("configs")
    words = ["dog", "cat", "sofa", "boats", "sea", "old", "red", "green"]
    rows = []
    for number in range(24):
        make_image((56, 28 * (1 + number % 3)), seed=number).save(folder / f"{number}.png")
        text = " ".join([*["a"] * (number // 2), words[number % 8], words[number // 3]])
        query = {"query_image": f"{number}.png"} if number % 3 else {"query": f"the {number}"}
        rows.append(query | {"positive": text})
    write_rows(folder / "pairs.jsonl", rows)
    texts = [
        {"query": f"the {number}", "positive": row["positive"]} for number, row in enumerate(rows)
    ]
    write_rows(folder / "texts.jsonl", texts)
    paths = {
        "untied": [f"init_from={untied_folder}"],
        "texts": [f"data.path={folder}/texts.jsonl"],
    }
    shared = [
        f"init_from={tiny_folder}",
        "data=pairs",
        f"data.path={folder}/pairs.jsonl",
        f"data.image_root={folder}",
        "data.validation_fraction=0.33",
        f"stage.order=[{','.join(STAGES)}]",
        "stage.token_budget=40",
        "stage.validate_every=5",
        "stage.validation_batch_size=4",
        *(f"stage.{s}.{o}" for s in STAGES for o in ("steps=5", "batch_size=8")),
        *(f"stage.{s}.optimization.{o}" for s in STAGES for o in ("warmup_steps=0", f"lr={LR}")),
        "num_workers=0",
        "evaluate=false",
        "logger=none",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
    ]

    def write(strategy: str, tuning: str, world: int) -> Path:
        trainer = [f"trainer={strategy}", f"trainer.devices={world}"]
        chosen = [*(TUNINGS | UNUSED | MORE)[tuning], *paths.get(tuning, [])]
        cfg = composed(*shared, f"cache_dir={folder}", *chosen, *trainer)
        path = folder / f"{strategy}-{tuning}-{world}.yaml"
        OmegaConf.save(cfg, path)
        return path

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs are, by name."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def make_job(compose_run: Callable[..., Path], folder: Path) -> Callable[..., Job]:
    def make(
        strategy: str, tuning: str, world: int, *, name: str | None = None, **values: bool
    ) -> Job:
        config = compose_run(strategy, tuning, world)
        return Job(config, folder / (name or config.stem), **values)

    return make


def jobs_of_two(names: list[str], make_job: Callable[..., Job]) -> list[Job]:
    """In order; a run that is called again-TUNING is stopped, and goes on."""
    jobs = []
    for name in names:
        strategy, tuning = name.split("-")[:2]
        if strategy == "again":
            jobs.append(make_job("fsdp", tuning, 2, name=name, stopped=True))
            jobs.append(make_job("fsdp", tuning, 2, name=name, resume=True))
        else:
            jobs.append(make_job(strategy, tuning, 2))
    return jobs


@pytest.fixture(scope="module")
def runs(make_job: Callable[..., Job], folder: Path) -> Path:
    """Runs of one and of two processes; one of two is stopped and goes on."""
    run(make_job("cpu", "full", 1))
    jobs = jobs_of_two(OF_TWO, make_job)
    start_ranks(work, jobs, world=2)
    return folder


@pytest.fixture(scope="module")
def more_runs(runs: Path, make_job: Callable[..., Job]) -> Path:
    """What is left out of `runs` for its time."""
    for tuning in ("dora", *UNUSED, *MORE):
        run(make_job("cpu", tuning, 1))
    jobs = jobs_of_two(MORE_OF_TWO, make_job)
    start_ranks(work, jobs, world=2)
    return runs


@pytest.fixture(scope="module")
def runs_of_four(more_runs: Path, make_job: Callable[..., Job]) -> Path:
    """The same by four; some are stopped, and go on with two."""
    jobs = [make_job(s, tuning, 4) for s in STRATEGIES for tuning in TUNINGS]
    names = {tuning: f"moved-{tuning}" for tuning in TUNINGS}
    jobs += [make_job("fsdp", t, 4, name=name, stopped=True) for t, name in names.items()]
    start_ranks(work, jobs, world=4)
    jobs = [make_job("fsdp", t, 2, name=name, resume=True) for t, name in names.items()]
    start_ranks(work, jobs, world=2)
    return more_runs


OF_TWO = ["ddp-full-2", "again-full"]
MORE_OF_TWO = [
    *("ddp-dora-2", "fsdp-dora-2", "fsdp-full-2", "again-dora"),
    *(f"fsdp-{tuning}-2" for tuning in MORE),
    *(f"again-{tuning}" for tuning in UNUSED),
]
OF_FOUR = [
    *(f"{strategy}-{tuning}-4" for strategy in STRATEGIES for tuning in TUNINGS),
    *(f"moved-{tuning}" for tuning in TUNINGS),
]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", OF_TWO)
def test_losses_and_weights_of_two_processes_equal_those_of_one(name: str, runs: Path) -> None:
    assert_as_one_process(runs / name, runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MORE_OF_TWO)
def test_so_do_those_of_other_kinds(name: str, more_runs: Path) -> None:
    assert_as_one_process(more_runs / name, more_runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OF_FOUR)
def test_losses_and_weights_of_four_processes_equal_those_of_one(
    name: str, runs_of_four: Path
) -> None:
    assert_as_one_process(runs_of_four / name, runs_of_four)


def assert_as_one_process(run_dir: Path, runs: Path) -> None:
    alone = runs / f"cpu-{run_dir.name.split('-')[1]}-1"
    expected, found = numbers(alone), numbers(run_dir)
    assert expected.keys() == found.keys()
    for key, number in expected.items():
        assert found[key] == pytest.approx(number, rel=2e-3, abs=2e-4), key
    weights, others = (load_file(r / "model" / "model.safetensors") for r in (alone, run_dir))
    assert_same(others, weights)


@pytest.mark.parametrize(
    ("tuning", "made"),
    [("full", "runs"), pytest.param("dora", "more_runs", marks=pytest.mark.slow)],
)
def test_the_runs_have_moved_the_weights(
    tuning: str, made: str, tiny_folder: Path, request: pytest.FixtureRequest
) -> None:
    """Otherwise equal weights would say nothing."""
    runs = request.getfixturevalue(made)
    before = load_file(tiny_folder / "model.safetensors")
    after = load_file(runs / f"cpu-{tuning}-1" / "model" / "model.safetensors")
    moved = [name for name, value in after.items() if (value - before[name]).abs().max() > 2e-3]
    assert len(moved) >= 20


def test_a_folder_of_shards_holds_the_weights_that_a_file_holds(runs: Path) -> None:
    names = ("ddp-full-2", "again-full")
    paths = [runs / name / "checkpoints" / "last.ckpt" for name in names]
    file, shards = (read_weights(path, read(path)) for path in paths)
    assert paths[1].is_dir()
    assert_same(shards, file)
    best, of_shards = (read_chosen(path.with_name("best.ckpt")) for path in paths)
    assert best[1]["steps"] == of_shards[1]["steps"]
    assert_same(of_shards[0], best[0])


def test_a_folder_that_lacks_a_shard_is_said_by_path(runs: Path, tmp_path: Path) -> None:
    kept = (runs / "again-full" / "checkpoints" / "last.ckpt").resolve()
    folder = shutil.copytree(kept, tmp_path / "best.shards")
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"best\.shards cannot be read as a checkpoint: .*distcp"):
        read_weights(folder, read(folder))


def test_only_the_newest_shards_are_kept(runs: Path) -> None:
    left = sorted(path.name for path in (runs / "again-full" / "checkpoints").iterdir())
    assert left == ["2-5-validated.shards", "best.ckpt", "last.ckpt"]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal up to rounding. AdamW turns the rounding of a gradient that is nearly zero into a step
    of its own, so some elements may be off by a part of the way that all of them went.
    """
    assert found.keys() == expected.keys()
    way = LR * 5 * len(STAGES)  # of an element, at most
    off = {name: (found[name] - value).flatten().double() for name, value in expected.items()}
    assert torch.cat(list(off.values())).square().mean().sqrt() < 0.01 * way
    for name, difference in off.items():
        assert difference.square().mean().sqrt() < 0.1 * way, name


def numbers(run_dir: Path) -> Metrics:
    """Without the bridge gain: whose contexts are exchanged depends on the rows of a rank."""
    found = read_metrics(run_dir / "metrics.csv")
    return {place: value for place, value in found.items() if "bridge_gain" not in place[2]}
