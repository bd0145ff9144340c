"""The sizes of a GPU fit 80 GB: weights and runs of both sides, on tensors without storage."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import dropout, layer_norm
from torch.overrides import TorchFunctionMode

from benchmarks import contrast, models, ours, training
from benchmarks.benchmark import FULL, GIB, SIDES, Benchmark
from benchmarks.counting import LiveBytes
from benchmarks.models import QWEN2_VL_2B, with_depth
from benchmarks.registry import BENCHMARKS
from cocoa_pl.attention import kernels

CPU = torch.device("cpu")
MEMORY = 79 * GIB  # of an H100 with 80 GB
LARGE = 10**6  # numbers of a tensor that gets no storage
ROWS = 24  # enough for a full chunk of both sides; memory does not grow with the batch
WITHOUT_STORAGE = FakeTensorMode(allow_non_fake_inputs=True)

Peaks = dict[str, float]


class AsOnCuda(TorchFunctionMode):
    """Where memory differs from the CPU's: under autocast layer norms are in float32, and dropout
    keeps one byte a number.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.randn and torch.Size(args[0] if len(args) == 1 else args).numel() > LARGE:
            return empty(torch.Size(args[0] if len(args) == 1 else args), torch.float32)
        if func is layer_norm and torch.is_autocast_enabled("cpu"):
            kwargs |= {name: kwargs[name].float() for name in ("weight", "bias")}
            return func(args[0].float(), *args[1:], **kwargs)
        if func is dropout and kwargs["training"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **kwargs)


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    with WITHOUT_STORAGE:
        return torch.empty(shape, dtype=dtype)


def without_storage(module: nn.Module, *to: Any, **_: Any) -> nn.Module:
    """In the place of `Module.to`: new parameters of the same shapes, shared as they were."""
    dtypes = [one for one in to if isinstance(one, torch.dtype)]
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in owner.named_parameters(recurse=False):
            dtype = dtypes[0] if dtypes else old.dtype
            new = made.setdefault(id(old), nn.Parameter(empty(old.shape, dtype), old.requires_grad))
            owner.register_parameter(name, new)
    return module


def stripped(value: Any) -> Any:
    """Large tensors of a task without their storage."""
    if isinstance(value, nn.Module):
        return without_storage(value)
    if isinstance(value, list):
        return [stripped(one) for one in value]
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > LARGE:
        return empty(value.shape, value.dtype).requires_grad_(value.requires_grad)
    return value


@pytest.fixture(autouse=True)
def a_gpu_without_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    def weightless(*args: Any, **kwargs: Any) -> Any:
        with WITHOUT_STORAGE:
            return models.stock_model(*args, **kwargs)

    def refusal(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
        return None if dtype in kernels.HALF else "computes in half precision"

    monkeypatch.setattr(nn.Module, "to", without_storage)
    monkeypatch.setattr(ours, "stock_model", weightless)
    monkeypatch.setattr(training, "stock_model", weightless)
    monkeypatch.setattr(kernels, "flash_refusal", refusal)


def peaks(benchmark: Benchmark, size: Any) -> Peaks:
    """What a run of each side takes with the weights and inputs of both."""
    found = {}
    with AsOnCuda(), LiveBytes() as live:
        task = benchmark.build(size, CPU)
        for name, value in vars(task).items():
            setattr(task, name, stripped(value))
        gc.collect()
        for side in SIDES:
            live.peak = live.now
            getattr(task, side)()
            found[side] = live.peak
    return found


def peaks_of_model(benchmark: Benchmark) -> Peaks:
    """Layers of a kind all take the same: three shallow models tell what the deep one takes."""

    def shallow(text: int, vision: int) -> Peaks:
        size = benchmark.sizes["cuda"]
        model = replace(size.model, shape=with_depth(QWEN2_VL_2B, text=text, vision=vision))
        return peaks(benchmark, replace(size, model=model, batch=min(size.batch, ROWS)))

    text, vision = (dict(part) for part in (QWEN2_VL_2B.text, QWEN2_VL_2B.vision))
    base, longer, taller = shallow(2, 1), shallow(3, 1), shallow(2, 2)
    return {
        side: base[side]
        + (text["num_hidden_layers"] - 2) * (longer[side] - base[side])
        + (vision["depth"] - 1) * (taller[side] - base[side])
        for side in SIDES
    }


def has_model(benchmark: Benchmark) -> bool:
    return hasattr(benchmark.sizes["cuda"], "model")


@pytest.mark.parametrize(
    "benchmark",
    [
        pytest.param(
            one, id=one.name, marks=[pytest.mark.slow] * (has_model(one) or one.id in {"B5", "B9"})
        )
        for one in (*BENCHMARKS, contrast.SAME_DROPOUT)
        if one.sizes["cuda"] != one.sizes["cpu"]  # on the processor else
    ],
)
def test_both_sides_fit_a_gpu(benchmark: Benchmark) -> None:
    whole = has_model(benchmark)
    found = peaks_of_model(benchmark) if whole else peaks(benchmark, benchmark.sizes["cuda"])
    assert max(found.values()) <= FULL * MEMORY, {side: f / GIB for side, f in found.items()}
    assert min(found.values()) > 0.01 * GIB  # counted at all
