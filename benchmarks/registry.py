"""Every benchmark, by name and by the id of its claim, in the order of the claims."""

from __future__ import annotations

from benchmarks import (
    attention_bridge,
    contrast,
    dora,
    encoding,
    images,
    masked_head,
    rebuilding,
    scoring,
    similarities,
    vision_attention,
)
from benchmarks.benchmark import Benchmark

BENCHMARKS: tuple[Benchmark, ...] = (
    masked_head.BENCHMARK,
    attention_bridge.BENCHMARK,
    vision_attention.BENCHMARK,
    vision_attention.WITH_BATCH_OF_ONE,
    encoding.PACKING,
    dora.BENCHMARK,
    dora.SAME_DROPOUT,
    images.BENCHMARK,
    images.LARGE,
    images.WITH_FLOATS,
    images.WHOLE_PATH,
    contrast.GRADIENT_CACHE,
    scoring.BENCHMARK,
    scoring.SHARED,
    similarities.BENCHMARK,
    rebuilding.WARMUP,
    rebuilding.RECONSTRUCT,
    contrast.BENCHMARK,
    encoding.BENCHMARK,
)
# Only by their names: variants, and what takes minutes for each pair of runs.
BY_NAME: tuple[Benchmark, ...] = (contrast.SAME_DROPOUT, contrast.WHOLE_BATCH_ON_ONE)
ALL = "all"


def names() -> list[str]:
    """What may be asked for."""
    ids = dict.fromkeys(benchmark.id for benchmark in BENCHMARKS)
    return [*(benchmark.name for benchmark in (*BENCHMARKS, *BY_NAME)), *ids, ALL]


def find(name: str) -> list[Benchmark]:
    """All benchmarks of that name or id."""
    if name == ALL:
        return list(BENCHMARKS)
    if alone := [benchmark for benchmark in BY_NAME if name == benchmark.name]:
        return alone
    return [benchmark for benchmark in BENCHMARKS if name in (benchmark.name, benchmark.id)]
