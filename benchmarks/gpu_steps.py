"""What `gpu_check` measures with torch, in a process of its own: the machine, and own steps at the
true dimensions of Qwen2-VL-2B.

python -m benchmarks.gpu_steps look|steps FILE SECONDS cpu|cuda
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks import write_json
from benchmarks.gpu_check import NO_TIME, Found
from benchmarks.measure import count, environment, matrix_product_ceiling, timed
from benchmarks.whole import draw_rows, exported, optimizer_of, stage_module
from cocoa_pl.attention import TEXT_ATTENTION
from cocoa_pl.attention.command import load_policy
from cocoa_pl.data.batch import Sample, pack
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.distributed.collectives import clip_gradients
from cocoa_pl.models.loading import load_inputs, published_config
from cocoa_pl.stages.base import StageModule

Run = Callable[[], object]
GIB = 2**30
CUDA = sys.argv[4:5] == ["cuda"]  # a process is for one device
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
SIDE, WORDS = (448, 64) if CUDA else (84, 8)  # 256, 9 visual tokens
# Tokens of a batch: of a graph 1,024 tokens take up to 16 GiB, so 80 GB hold half a batch's.
BUDGET, BUDGET_WITH_GRAPH = (8192, 4096) if CUDA else (120, 120)
TUNINGS = {"dora": (), "lora": ("adapter=lora",), "lean": ("adapter.dropout_on_base=false",)}
# By worth: a stage, a tuning ("dora" as it ships), and whether blocks are recomputed.
CASES = (
    *("encode", "warmup dora checkpointing", "contrast dora checkpointing", "warmup lora"),
    *("reconstruct dora checkpointing", "contrast lora", "warmup lean", "contrast lean"),
    *("warmup lora checkpointing", "warmup dora", "contrast dora"),
)


def main(part: str, file: str, seconds: str, _: str) -> None:
    """Write what each case finds, or its error, which ends this case alone. None begins where the
    longest before it would not end in time.
    """
    if CUDA and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here")
    torch.set_num_threads(1)
    ceiling = matrix_product_ceiling(DEVICE, side=None if CUDA else 256)["flops_per_second"]
    works: Mapping[str, Callable[[], Found]] = {
        "versions": versions,
        "ceilings": lambda: {"product_tflops": ceiling / 1e12, "copy_tb_per_s": copied() / 1e12},
    }
    if part == "steps":
        works = {name: partial(step, name, ceiling) for name in CASES}
    found, end = Found(), time.monotonic() + float(seconds)
    for name, work in works.items():
        start = time.monotonic()
        if start + max((case.get("took", 0.0) for case in found.values()), default=0.0) > end:
            found[name] = dict(NO_TIME)
        else:
            try:
                found[name] = work()
            except Exception as error:
                traceback.print_exc()
                found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            found[name]["took"] = round(time.monotonic() - start, 1)
        write_json(Path(file), found)
        print(name, found[name], flush=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def versions() -> Found:
    memory = torch.cuda.get_device_properties(DEVICE).total_memory / GIB if CUDA else None
    return environment(DEVICE) | {"cudnn": torch.backends.cudnn.version(), "memory_gib": memory}


def copied() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(2**28 if CUDA else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), DEVICE) for _ in range(6))


def step(name: str, ceiling: float) -> Found:
    """Build a case and run its step some times.

    Args:
        name: of `CASES`.
        ceiling: operations per second.
    """
    kind, *choices = name.split()
    checkpointing, encoding = "checkpointing" in choices, kind == "encode"
    folder = exported("smallest", torch.bfloat16)
    small = load_inputs(Path(folder))  # its tokenizer serves any size
    config: Any = published_config("Qwen/Qwen2-VL-2B-Instruct")
    if not CUDA:
        config = AutoConfig.from_pretrained(folder)
    with DEVICE:
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation=TEXT_ATTENTION
        )
    backbone = small.family(model, small.image_processor, kernel="auto").to(DEVICE)
    backbone.requires_grad_(False)
    if checkpointing:  # as `loading.load` does it
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    processor = Processor(
        small.tokenizer,
        small.image_processor,
        max_length=1 << 15,
        min_pixels=SIDE**2,
        max_pixels=SIDE**2,
        num_token_rows=config.text_config.vocab_size,
    )
    budget = BUDGET if checkpointing or encoding else BUDGET_WITH_GRAPH
    samples = draw_samples(kind, budget, processor)
    if encoding:
        batch = pack(samples, backbone.eval().planner(load_policy("bidirectional")))
        run: Run = torch.inference_mode()(lambda: backbone.embed(batch.to(DEVICE)))
    else:
        changes = [word for choice in choices for word in TUNINGS.get(choice, ())]
        paper = ["experiment=paper_qwen2vl_2b", "data.root=none", "benchmark.root=none"]
        module = stage_module(kind, [*paper, *changes], backbone, processor, budget)
        run = step_of(module, samples)
    run()  # what is set up once
    if CUDA:
        torch.cuda.reset_peak_memory_stats(DEVICE)
    seconds = median(timed(run, DEVICE) for _ in range(3))
    peak = torch.cuda.max_memory_allocated(DEVICE) if CUDA else 0
    counted = count(run)
    return {
        "samples": len(samples),
        "tokens": sum(sample.num_tokens for sample in samples),
        "seconds": seconds,
        "samples_per_second": len(samples) / seconds,
        "tflop": counted["flops"] / 1e12,
        "share_of_ceiling": counted["flops"] / seconds / ceiling,
        "peak_gib": (peak or counted["peak_bytes"]) / GIB,
        "profile": kernels(run),
    }


def draw_samples(kind: str, budget: int, processor: Processor) -> list[Sample]:
    """Pictures with texts that fill a batch, for contrast two; to be rebuilt is a text as long."""
    words, sides = " seven" * WORDS, 2 if kind == "contrast" else 1  # a token each
    target = words if kind == "reconstruct" else None
    ((picture, _),) = draw_rows(1, side=SIDE)
    item = Item(IMAGE_SLOT + words, (picture,))
    one = processor(item, target, key=0, row_id="0")
    number = max(1, budget // one.num_tokens) * sides
    return [replace(one, key=n, row_id=f"{n}", role=n % sides) for n in range(number)]


def step_of(module: StageModule, samples: list[Sample]) -> Run:
    """An optimizer step of a stage, on batches that wait in pinned memory."""
    if masking := module.masking:
        samples = [masking(sample, np.random.default_rng(sample.key)) for sample in samples]
    batches = module.collator(validating=False)([[sample] for sample in samples])
    batches = [batch.pin_memory() if CUDA else batch for batch in batches]
    optimizer = optimizer_of(module)

    def run() -> None:
        optimizer.zero_grad()
        module.accumulate(batches)
        clip_gradients(module.parameters(), module.optimization.clip_norm)
        optimizer.step()

    return run


def kernels(run: Run) -> Found:
    """How many there are, how long they keep the device busy, and which do most."""
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as seen:
        timed(run, DEVICE)
    field = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events = [(getattr(e, field), e.count, e.key[:90]) for e in seen.key_averages()]
    events = sorted((event for event in events if event[0] > 0), reverse=True)
    busy = sum(took for took, _, _ in events)
    top = [[name, count, round(took / busy, 3)] for took, count, name in events[:10]]
    return {
        "kernels": sum(number for _, number, _ in events),
        "device_seconds": busy / 1e6,
        "top": top,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
