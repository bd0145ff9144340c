"""What `gpu_check` measures with torch, in a process of its own: the machine and its kernels, and
own steps at the true dimensions of Qwen2-VL-2B.

python -m benchmarks.gpu_parts look|steps FILE SECONDS cpu|cuda
"""

from __future__ import annotations

import gc
import inspect
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.attention_bridge import policy
from benchmarks.counting import cost_of
from benchmarks.gpu_check import Found, write_json
from benchmarks.machine import environment, matrix_product_ceiling
from benchmarks.models import MERGE, PATCH, QWEN2_VL_2B, SMALL
from benchmarks.ours import wrapped
from benchmarks.samples import Mix, draw, make_processor, process
from benchmarks.timing import measured
from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import compose_overrides
from cocoa_pl.data.batch import Sample, pack
from cocoa_pl.data.processor import Processor
from cocoa_pl.distributed.collectives import clip_gradients
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.run import build_stages

Run = Callable[[], object]
GIB, BF16 = 2**30, torch.bfloat16
CUDA = sys.argv[4:5] == ["cuda"]  # a process is for one device
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
SHAPE, SIDE, WORDS = (QWEN2_VL_2B, 448, 64) if CUDA else (SMALL, 84, 8)  # 256, 9 visual tokens
# Tokens of a batch: of a graph 1,024 tokens take up to 16 GiB, so 80 GB hold half a batch's.
BUDGET, BUDGET_WITH_GRAPH = (8192, 4096) if CUDA else (120, 120)
PAPER = ("experiment=paper_qwen2vl_2b", "data.root=none", "benchmark.root=none")
TUNINGS = {"dora": (), "lora": ("adapter=lora",), "lean": ("adapter.dropout_on_base=false",)}
# By worth: a stage, a tuning ("dora" as it ships), and whether blocks are recomputed.
CASES = (
    *("encode", "warmup dora checkpointing", "contrast dora checkpointing", "warmup lora"),
    *("reconstruct dora checkpointing", "contrast lora", "warmup lean", "contrast lean"),
    *("warmup lora checkpointing", "warmup lean checkpointing", "contrast lora checkpointing"),
    *("contrast lean checkpointing", "warmup dora", "contrast dora", "reconstruct lora"),
    *("reconstruct lean", "reconstruct dora", "reconstruct lora checkpointing"),
    "reconstruct lean checkpointing",
)


def attempt(found: Found, file: Path, name: str, work: Callable[[], Found], *, end: float) -> None:
    """Write what a case finds, or its error, which ends this case alone.

    None begins where the longest before it would not end in time.
    """
    start = time.monotonic()
    longest = max((case.get("took", 0.0) for case in found.values()), default=0.0)
    if start + longest > end:
        found[name] = {"skipped": "no time left"}
    else:
        try:
            found[name] = work()
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        found[name]["took"] = round(time.monotonic() - start, 1)
    write_json(file, found)
    print(name, found[name], flush=True)
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def milliseconds(run: Run) -> float:
    run()
    return 1e3 * median(measured(run, DEVICE).wall for _ in range(5))


# --- Look --------------------------------------------------------------------------------------


def versions() -> Found:
    memory = torch.cuda.get_device_properties(DEVICE).total_memory / GIB if CUDA else None
    return environment(DEVICE) | {"cudnn": torch.backends.cudnn.version(), "memory_gib": memory}


def ceiling() -> float:
    """Operations per second of a large matrix product."""
    return matrix_product_ceiling(DEVICE, side=None if CUDA else 256)["flops_per_second"]


def ceilings() -> Found:
    """A product's, and a copy's, whose bytes are read and written."""
    source = torch.empty(2**28 if CUDA else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2e3 * source.nbytes / milliseconds(lambda: target.copy_(source))
    return {"product_tflops": ceiling() / 1e12, "copy_tb_per_s": rate / 1e12}


def grouped_heads() -> Found:
    """How `varlen_attn` is called, and whether 12 query heads may share 2 heads of keys."""
    call: Any = varlen_attn
    parameters = inspect.signature(call).parameters
    found: Found = {"parameters": " ".join(parameters)}
    if not CUDA:
        return found
    lengths = torch.tensor([300, 17, 64, 900, 5])
    bounds = pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
    q, k, v = (torch.randn(1286, n, 128, device=DEVICE, dtype=BF16) for n in (12, 2, 2))
    expected = call(q, *(x.repeat_interleave(6, dim=1) for x in (k, v)), bounds, bounds, 900, 900)
    more = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    try:
        difference = call(q, k, v, bounds, bounds, 900, 900, **more) - expected
        found["grouped_differs_by"] = float(difference.norm() / expected.norm())
    except (RuntimeError, TypeError, ValueError) as error:  # an answer too
        found["refuses_grouped"] = str(error)[:200]
    return found


def patch_embedding() -> Found:
    """The stock convolution, which is not used, against the product that is."""
    found: Found = {}
    for dtype in (BF16, torch.float32):
        conv = nn.Conv3d(3, 1280, (2, 14, 14), (2, 14, 14), bias=False).to(DEVICE, dtype)
        conv.requires_grad_(False)
        patches = torch.randn(24_576 if CUDA else 64, 3, 2, 14, 14).to(DEVICE, dtype)
        product = partial(linear, patches.flatten(1), conv.weight.flatten(1))
        stock, ours = conv(patches).flatten(1).double(), product().double()
        found[str(dtype)] = {
            "convolution_ms": milliseconds(partial(conv, patches)),
            "product_ms": milliseconds(product),
            "difference": float((stock - ours).norm() / ours.norm()),
        }
    return found


def new_shapes() -> Found:
    """First and second calls of SDPA under a mask at shapes not seen before, with cuDNN and not."""
    found: Found = {"with_cudnn_ms": [], "without_cudnn_ms": []}
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    for length in (301, 333, 365, 302, 334, 366):
        torch.backends.cuda.enable_cudnn_sdp(length % 2 == 1)
        states = torch.randn(3, 4, 12, length, 128, device=DEVICE, dtype=BF16, requires_grad=True)
        mask = (torch.arange(length, device=DEVICE) < length - 7).expand(4, 1, 1, length)
        run = partial(attend_and_back, states, mask)
        calls = [round(1e3 * measured(run, DEVICE).wall, 2) for _ in range(2)]
        found["with_cudnn_ms" if length % 2 else "without_cudnn_ms"].append(calls)
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    return found


def attend_and_back(states: Tensor, mask: Tensor) -> None:
    q, k, v = states
    scaled_dot_product_attention(q, k, v, mask).sum().backward()


LOOK = (versions, ceilings, grouped_heads, patch_embedding, new_shapes)

# --- Steps -------------------------------------------------------------------------------------


def step(name: str, most: float) -> Found:
    """Build a case and run its step some times.

    Args:
        name: of `CASES`.
        most: operations per second.
    """
    kind, *choices = name.split()
    checkpointing, encoding = "checkpointing" in choices, kind == "encode"
    budget = BUDGET if checkpointing or encoding else BUDGET_WITH_GRAPH
    processor = make_processor(SHAPE, SIDE**2)
    samples = draw_samples(kind, budget, processor)
    images = processor.image_processor
    backbone = wrapped(SHAPE, image_processor=images, kernel="auto", device=DEVICE, dtype=BF16)
    backbone.requires_grad_(False)
    if checkpointing:  # as `loading.load` does it
        backbone.stock.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.stock.enable_input_require_grads()
    module: nn.Module = backbone
    if encoding:
        run = encoder(backbone.eval(), samples)
    else:
        overrides = [word for choice in choices for word in TUNINGS.get(choice, ())]
        run, module = trainer(kind, [*PAPER, *overrides], backbone, samples, processor, budget)
    tokens = sum(sample.num_tokens for sample in samples)
    return {"samples": len(samples), "tokens": tokens} | figures(run, module, len(samples), most)


def draw_samples(kind: str, budget: int, processor: Processor) -> list[Sample]:
    """Pictures with texts that fill a batch, for contrast two; to be rebuilt is a text as long."""
    target, sides = WORDS * (kind == "reconstruct"), 2 if kind == "contrast" else 1
    mix = Mix(text=WORDS, target=target, spread=0, sides=(SIDE,), max_pixels=SIDE**2)
    tokens = (SIDE // (PATCH * MERGE)) ** 2 + 3 + WORDS + target  # start, end, EOS
    count = max(1, budget // tokens) * sides
    drawn = draw(mix, count, shape=SHAPE, seed=0)
    return [process(one, processor, n, role=n % sides) for n, one in enumerate(drawn)]


def encoder(backbone: Backbone, samples: list[Sample]) -> Run:
    """Vectors of a batch, which is moved to the device each time."""
    batch = pack(samples, backbone.planner(policy("bidirectional")))
    return torch.inference_mode()(lambda: backbone.embed(batch.to(DEVICE)))


def trainer(
    kind: str,
    overrides: list[str],
    backbone: Backbone,
    samples: list[Sample],
    processor: Processor,
    budget: int,
) -> tuple[Run, nn.Module]:
    """An optimizer step of a stage as its config has it, and the stage's module."""
    cfg = compose_overrides("train", overrides)
    (stage,) = (stage for stage in build_stages(cfg) if stage.name == kind)
    stage = replace(stage, token_budget=budget)
    module: Any = stage.make_module(build(cfg.adapter)(backbone), processor, steps=1, seed=0)
    module.to(DEVICE).manual_backward = lambda loss: loss.backward()
    if masking := module.masking:
        samples = [masking(sample, np.random.default_rng(sample.key)) for sample in samples]
    batches = module.collator(validating=False)([[sample] for sample in samples])
    batches = [batch.pin_memory() if CUDA else batch for batch in batches]
    (optimizer,), _ = module.configure_optimizers()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def run() -> None:
        optimizer.zero_grad()
        module.accumulate(batches)
        clip_gradients(trained, stage.optimization.clip_norm)
        optimizer.step()

    return run, module


def figures(run: Run, module: nn.Module, samples: int, most: float) -> Found:
    """Time, operations, memory and kernels of a run."""
    run()  # what is set up once
    if CUDA:
        torch.cuda.reset_peak_memory_stats(DEVICE)
    seconds = median(measured(run, DEVICE).wall for _ in range(3))
    peak = torch.cuda.max_memory_allocated(DEVICE) if CUDA else 0
    cost = cost_of(run, device=DEVICE, parameters=list(module.parameters()))
    return {
        "seconds": seconds,
        "samples_per_second": samples / seconds,
        "tflop": cost.flops / 1e12,
        "share_of_ceiling": cost.flops / seconds / most,
        "peak_gib": (peak or cost.peak_bytes) / GIB,
        "profile": kernels(run),
    }


def kernels(run: Run) -> Found:
    """How many there are, how long they keep the device busy, and which do most."""
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as seen:
        measured(run, DEVICE)
    field = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events = [(getattr(e, field), e.count, e.key[:90]) for e in seen.key_averages()]
    events = sorted((event for event in events if event[0] > 0), reverse=True)
    busy = sum(took for took, _, _ in events)
    top = [[name, count, round(took / busy, 3)] for took, count, name in events[:10]]
    count = sum(count for _, count, _ in events)
    return {"kernels": count, "device_seconds": busy / 1e6, "top": top}


def main(part: str, file: str, seconds: str, _: str) -> None:
    if CUDA and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here")
    torch.set_num_threads(1)
    works: dict[str, Callable[[], Found]] = {work.__name__: work for work in LOOK}
    if part == "steps":
        most = ceiling()
        works = {name: partial(step, name, most) for name in CASES}
    found, end = Found(), time.monotonic() + float(seconds)
    for name, work in works.items():
        attempt(found, Path(file), name, work, end=end)


if __name__ == "__main__":
    main(*sys.argv[1:])
