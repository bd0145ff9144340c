"""Whether planned stages fit a GPU, and the smallest changes with which they would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from cocoa_pl.planning.memory import ACTIVATIONS, GATHERED, Setup, static_memory
from cocoa_pl.planning.stage_plan import StagePlan
from cocoa_pl.planning.tuning import Adapter

GIB = 2**30
SMALLEST_BUDGET = 512
MOST_GPUS = 64
ROOM = 0.95  # what is proposed fills no more of a GPU, since activations are known to 10 %


@dataclass(frozen=True)
class Hardware:
    """A GPU.

    Args:
        memory_gib: what a program can have, in GiB.
        tflops: dense peaks by type, `bfloat16` and `float32`, in 10^12 operations a second.
        context_gib: taken by CUDA, NCCL and cuBLAS before the first tensor; an assumption.
        slack: share of activations that the allocator loses to gaps; an assumption.
    """

    name: str
    memory_gib: float
    tflops: Mapping[str, float]
    context_gib: float
    slack: float

    def needed(self, memory: Mapping[str, int]) -> dict[str, float]:
        """GiB by part, with what the context and the allocator take."""
        parts = {part: size / GIB for part, size in memory.items()}
        working = parts[ACTIVATIONS] + parts.get(GATHERED, 0)
        gaps = self.slack * working
        return parts | {"context (assumed)": self.context_gib, "gaps (assumed)": gaps}

    def fits(self, plan: StagePlan) -> bool:
        held = static_memory(plan.setup, decoder=False)
        if sum(held.values()) / GIB > self.memory_gib:  # no need to count the rest
            return False
        return sum(self.needed(plan.memory).values()) <= self.memory_gib


@dataclass(frozen=True)
class Remedy:
    """What to add to the command line, and what it costs."""

    overrides: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class _Variant:
    setup: Setup
    budget: int | None  # None leaves each stage its own
    overrides: tuple[str, ...]


def remedies(
    plans: Sequence[StagePlan], hardware: Hardware, *, lora: Adapter, others: Sequence[Hardware]
) -> list[Remedy]:
    """Changes with which every stage fits: the smallest that trains the same, more GPUs if that
    takes them, adapters instead of full tuning, and another GPU.

    Args:
        lora: what `adapter=lora` means.
        others: GPUs by size.
    """
    setup = plans[0].setup
    budgets = _budgets(plans)
    hardware, *others = (_with_room(gpu) for gpu in (hardware, *others))
    found = []
    if same := _first(plans, hardware, _same_gpus(setup, budgets)):
        found.append(Remedy(same, "trains the same"))
    elif more := _first(plans, hardware, _more_gpus(setup, budgets)):
        found.append(Remedy(more, "trains the same on more GPUs"))
    if setup.adapter is None:
        adapted = _first(plans, hardware, _adapted(setup, lora, budgets))
        if adapted:
            found.append(Remedy(adapted, "another method: adapters instead of all weights"))
    for other in others:
        larger = other.memory_gib > hardware.memory_gib
        if larger and all(other.fits(plan) for plan in plans):
            found.append(Remedy((f"hardware={other.name}",), "nothing else changes"))
            break
    return found


def _with_room(hardware: Hardware) -> Hardware:
    return replace(hardware, memory_gib=ROOM * hardware.memory_gib)


def _first(
    plans: Sequence[StagePlan], hardware: Hardware, variants: Iterator[_Variant]
) -> tuple[str, ...] | None:
    for variant in variants:
        changed = (
            plan.with_changes(variant.setup, token_budget=variant.budget or plan.stage.token_budget)
            for plan in plans
        )
        if all(hardware.fits(plan) for plan in changed):
            return variant.overrides
    return None


def _budgets(plans: Sequence[StagePlan]) -> list[int | None]:
    """None, then halves of the token budget down to the longest sample."""
    budget = max(plan.stage.token_budget for plan in plans)
    least = max(SMALLEST_BUDGET, *(plan.longest for plan in plans))
    budgets: list[int | None] = [None]
    while (budget := budget // 2) >= least:
        budgets.append(budget)
    return budgets


def _same_gpus(setup: Setup, budgets: Sequence[int | None]) -> Iterator[_Variant]:
    """Fewer changes first; among as many, what costs no time before what does."""
    checkpointing = [False] if setup.checkpointing else [False, True]
    sharding = [False, True] if setup.gpus > 1 and not setup.sharded else [False]
    narrowing = [False] if setup.width == 2 else [False, True]
    variants = []
    for budget, saves, shards, narrow in product(budgets, checkpointing, sharding, narrowing):
        variant = _change(setup, budget, saves=saves, shards=shards, narrow=narrow)
        cost = (len(variant.overrides), narrow, shards, saves, budgets.index(budget))
        variants.append((cost, variant))
    for cost, variant in sorted(variants, key=lambda pair: pair[0]):
        if cost[0]:
            yield variant


def _change(
    setup: Setup, budget: int | None, *, saves: bool, shards: bool, narrow: bool
) -> _Variant:
    overrides = []
    if shards:
        setup = replace(setup, sharded=True)
        overrides.append("trainer=fsdp")
    if saves:
        setup = replace(setup, checkpointing=True)
        overrides.append("model.gradient_checkpointing=true")
    if narrow:
        setup = replace(setup, width=2)
        overrides.append("model.dtype=bfloat16")
    if budget is not None:
        overrides.append(f"stage.token_budget={budget}")
    return _Variant(setup, budget, tuple(overrides))


def _more_gpus(setup: Setup, budgets: Sequence[int | None]) -> Iterator[_Variant]:
    gpus = setup.gpus
    while (gpus := 2 * gpus) <= MOST_GPUS:
        sharded = replace(setup, gpus=gpus, sharded=True)
        first = (f"gpus={gpus}",) if setup.sharded else (f"gpus={gpus}", "trainer=fsdp")
        for variant in (_Variant(sharded, None, ()), *_same_gpus(sharded, budgets)):
            yield replace(variant, overrides=(*first, *variant.overrides))


def _adapted(setup: Setup, lora: Adapter, budgets: Sequence[int | None]) -> Iterator[_Variant]:
    adapted = replace(setup, adapter=lora)
    for variant in (_Variant(adapted, None, ()), *_same_gpus(adapted, budgets)):
        yield replace(variant, overrides=("adapter=lora", *variant.overrides))
