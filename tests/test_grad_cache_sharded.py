"""With FSDP2 on two processes, the gradient cache and shared DoRA norms give the gradients of one
process with peft's own layers.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, normalize

from cocoa_pl.distributed.strategies import shard
from cocoa_pl.grad_cache import GradientCache
from cocoa_pl.models.dora import make_lean, shared_norms
from tests.processes import start_ranks

pytestmark = pytest.mark.slow  # two processes that import everything

WORLD, ROWS, WIDTH = 2, 8, 12
STEPS = 2  # norms of the first must not serve in the second


class Block(nn.Module):
    """What is gathered at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(torch.tanh(self.up(x)))
        return output


def build(*, lean: bool) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, use_dora=True, target_modules=["up", "down"]
    )
    model = peft.get_peft_model(nn.Sequential(Block(), Block()), config)  # type: ignore[arg-type]
    if lean:
        make_lean(model, dropout_on_base=True)
    return model


def loss(embeddings: Tensor) -> Tensor:
    unit = normalize(embeddings, dim=-1)
    return cross_entropy(unit @ unit.T * 5, torch.arange(len(unit)).roll(-1), reduction="sum")


def rows_of(index: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))


def whole(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def steps(model: Any, shares: list[Tensor]) -> list[dict[str, Tensor]]:
    """Gradients of each optimizer step; plain descent, which magnifies no rounding."""
    found = []
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with shared_norms(model):
            for rows in shares:
                cache = GradientCache(model, rows.split(2))
                loss(cache.embeddings).backward()
                cache.backward(lambda t: t.backward())
        found.append({name: whole(p.grad) for name, p in trained.items()})
        optimizer.step()
    return found


def work(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    model = build(lean=True)
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    shard([model], blocks=blocks, mesh=mesh, compute_dtype=None)
    found = steps(model, [rows_of(index)])
    if index == 0:
        Path(folder, "found").write_bytes(pickle.dumps(found))
    dist.barrier()  # so that no process leaves while another waits for it
    dist.destroy_process_group()


def test_sharded_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    start_ranks(work, str(tmp_path), world=WORLD)
    sharded = pickle.loads((tmp_path / "found").read_bytes())
    expected = steps(build(lean=False), [rows_of(index) for index in range(WORLD)])
    for found, single in zip(sharded, expected, strict=True):
        assert found.keys() == single.keys()
        assert len(found) == 12  # A, B and magnitudes of four layers
        for name, gradient in single.items():
            assert gradient.abs().max() > 1e-3, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=5e-5, msg=name)
