"""Two processes on the CPU give in one step what one process gives on the whole batch; whole
runs, also of four, are in `test_parallel_runs.py`.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from cocoa_pl.data.batch import Sample
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.distributed import collectives
from cocoa_pl.distributed.collectives import (
    exchange_counts,
    gather_rows,
    global_sum,
    is_lost_peer,
    rank,
    sum_gradients,
    world_size,
)
from cocoa_pl.models.loading import load
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.contrastive import PoolPrecision
from tests.processes import start_ranks
from tests.stages.steps import Rows, batches_of, make_module

CPU = torch.device("cpu")
WORLD = 2
SHARES = (slice(0, 3), slice(3, 5))  # rows of each rank: not the same number

Found = dict[str, dict[str, Any]]

# With all that contrast may do: masks, both directions, widths, blocks, a learnt temperature.
CASES: dict[str, dict[str, Any]] = {
    "contrast": {"matryoshka_dims": (8, 16), "similarity_block": 2},
    "warmup": {},
}


@dataclasses.dataclass
class Task:
    """What the processes compute with."""

    model: Path
    processor: Processor
    pairs: Rows
    captions: Rows


def summed_step(module: StageModule, rows: Rows) -> dict[str, Any]:
    """Loss and gradients of one global batch, by name."""
    metrics = module.accumulate(batches_of(module, rows))
    sum_gradients(module.parameters())
    found = {f"metric {name}": value for name, value in metrics.items()}
    return found | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def stage_steps(task: Task, share: slice) -> Found:
    found: Found = {}
    for stage, choices in CASES.items():
        loaded = load(task.model, kernel="sdpa", dtype="float32", gradient_checkpointing=False)
        module = make_module(
            stage, loaded.backbone.eval(), task.processor, token_budget=30, **choices
        )
        rows = task.pairs if stage == "contrast" else task.captions
        found[stage] = summed_step(module, rows[share])
    return found


def precision(share: slice) -> Tensor:
    """Of eight rows in two pools; a query and a positive are there twice, and hit either way."""
    draws = torch.Generator().manual_seed(0)
    queries, positives = normalize(torch.randn(2, 8, 4, generator=draws), dim=-1)
    queries[1], positives[4] = queries[0], positives[3]
    keys = (torch.tensor([0, 0, *range(2, 8)]), torch.tensor([10, 11, 12, 13, 13, 15, 16, 17]))
    metric = PoolPrecision(block=2)
    pools = torch.tensor([7, 9, 7, 7, 9, 9, 7, 9])
    metric.update(*(one[share] for one in (queries, positives, *keys, pools)))
    return metric.compute()


def primitives() -> Found:
    """Sums and gathers of rank-dependent values, forward and backward."""
    here = rank()
    used, unused, nowhere, frozen = (nn.Parameter(torch.zeros(2)) for _ in range(4))
    wide = nn.Parameter(torch.zeros(3, 2))
    frozen.requires_grad_(False)
    used.grad = torch.full((2,), here + 1.0)
    wide.grad = torch.full_like(wide, 5.0)
    if here:
        unused.grad = torch.full((2,), 7.0)
    sum_gradients([used, unused, nowhere, frozen, wide])
    return {
        "primitives": {
            "world": world_size(),
            "sum": global_sum(torch.tensor([1.0, here])),
            "precision": precision(slice(3) if here else slice(3, None)),
            "used": used.grad,
            "unused": unused.grad,
            "nowhere": nowhere.grad,
            "frozen": frozen.grad,
            "wide": wide.grad,
        }
    }


def work(index: int, folder: Path) -> None:
    """One of the processes: computes its share and writes what it found."""
    with (folder / "task.pkl").open("rb") as file:
        task: Task = pickle.load(file)
    found = primitives() | stage_steps(task, SHARES[index]) | gatherings_of(index)
    torch.save(found, folder / f"{index}.pt")


# Rows of every rank: different numbers, the same, and none on one of them.
GATHERED = {"unequal": [1, 3], "equal": [2, 2], "none": [0, 2]}


def gatherings_of(index: int) -> Found:
    """Gathers rows that say whose they are; the loss weighs every row differently on every rank."""
    counts = exchange_counts([sizes[index] for sizes in GATHERED.values()], CPU)
    found: Found = {}
    for kind, sizes in zip(GATHERED, counts, strict=True):
        rows = (10.0 * index + torch.arange(float(sizes[index]))).requires_grad_()
        gathered = gather_rows(rows, sizes)
        weight = (index + 1) * torch.arange(1.0, len(gathered) + 1)
        (gathered * weight).sum().backward()
        found[kind] = {
            "counts": sizes,
            "rows": gathered.detach(),
            "numbers": gather_rows(rows.detach().long(), sizes),
            "gradient": rows.grad,
        }
    return found


@pytest.fixture(scope="module")
def task(tiny_folder: Path, processor: Processor, make_item: Callable[..., Item]) -> Task:
    """Five rows; of the pairs the first and the last have the same positive, and one in three has
    a hard negative.
    """

    def sample(seed: int, images: int, target: str | None = None, role: int = 0) -> Sample:
        item = make_item(seed, images=images)
        return processor(item, target, key=item.key, row_id=f"row {seed}", role=role)

    pairs = [
        [sample(n, 1), sample(10 + n, 0, role=1), sample(20 + n, n % 2, role=2)] for n in range(5)
    ]
    pairs[4][1] = pairs[0][1]
    captions = [[sample(30 + n, n % 3, make_item(40 + n).text)] for n in range(5)]
    return Task(tiny_folder, processor, pairs, captions)


@pytest.fixture(scope="module")
def folder(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave behind."""
    folder = tmp_path_factory.mktemp("ranks")
    with (folder / "task.pkl").open("wb") as file:
        pickle.dump(task, file)
    start_ranks(work, folder, world=WORLD)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Found]:
    """What each of the processes found."""
    return [torch.load(folder / f"{index}.pt", weights_only=False) for index in range(WORLD)]


@pytest.fixture(scope="module")
def whole(task: Task) -> Found:
    """What one process finds on all rows."""
    return stage_steps(task, slice(None))


@pytest.mark.parametrize("kind", ["unequal", "equal", "none"])
def test_gathered_rows_are_those_of_all_ranks_in_order(kind: str, ranks: list[Found]) -> None:
    sizes = GATHERED[kind]
    expected = [10.0 * index + row for index, size in enumerate(sizes) for row in range(size)]
    for found in (part[kind] for part in ranks):
        assert found["counts"] == sizes
        assert found["rows"].tolist() == found["numbers"].tolist() == expected
        assert found["numbers"].dtype == torch.int64


@pytest.mark.parametrize("kind", ["unequal", "equal", "none"])
def test_a_gathered_row_gets_the_gradient_of_all_ranks(kind: str, ranks: list[Found]) -> None:
    all_ranks = sum(range(1, WORLD + 1))  # rank r weighs everything r + 1 times
    expected = torch.arange(1.0, sum(GATHERED[kind]) + 1) * all_ranks
    found = torch.cat([part[kind]["gradient"] for part in ranks])
    assert torch.equal(found, expected)


def test_gradients_are_summed_and_a_missing_one_counts_as_zero(ranks: list[Found]) -> None:
    for found in (part["primitives"] for part in ranks):
        assert torch.equal(found["used"], torch.full((2,), 3.0))
        assert torch.equal(found["unused"], torch.full((2,), 7.0))
        assert found["nowhere"] is None  # as on one process: the optimizer leaves it alone
        assert found["frozen"] is None
        assert torch.equal(found["wide"], torch.full((3, 2), 10.0))


def test_sums_and_precision_are_over_ranks(ranks: list[Found]) -> None:
    for found in (part["primitives"] for part in ranks):
        assert found["world"] == 2
        assert torch.equal(found["sum"], torch.tensor([2.0, 1.0]))
        assert torch.equal(found["precision"], precision(slice(None)))
        assert 0 < found["precision"] < 1


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_one_process_on_the_whole_batch(
    name: str, ranks: list[Found], whole: Found
) -> None:
    for found in (part[name] for part in ranks):
        assert found.keys() == whole[name].keys()
        for key, value in whole[name].items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_ranks_have_different_numbers_of_tokens(task: Task) -> None:
    """Otherwise a mean of the ranks' means would pass too."""
    sizes = [sum(row[0].segment_lengths[0] for row in task.captions[share]) for share in SHARES]
    assert sizes[0] != sizes[1]


def test_only_an_exchange_that_failed_is_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert not is_lost_peer(lost)  # alone
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    assert is_lost_peer(lost)
    assert is_lost_peer(dist.DistBackendError("NCCL"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
