"""`cocoa plan`: memory, time and disk of a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import compose_overrides, run_app
from cocoa_pl.config.saved import settled
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.report import plain_table
from cocoa_pl.models.loading import DTYPES, find_config
from cocoa_pl.planning.counting import ACTIVATIONS
from cocoa_pl.planning.step import (
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Lengths,
    as_on_gpu,
    make_step,
    open_model,
    run_step,
)
from cocoa_pl.run import build_stages
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.recipe import Stage
from cocoa_pl.stages.trainer import checked_precision

GIB = 2**30
FLOAT32 = 4  # bytes of what trains, of its gradient and of each of AdamW's two moments


Plan = dict[str, Any]  # what goes into `json`: bytes, floating-point operations, seconds, hours


def run(words: Sequence[str], console: Console) -> int:
    """Run the command line's words; the exit status is 0 if training fits and 1 if not."""
    if "trainer=cpu" in words and not any(word.startswith("hardware=") for word in words):
        words = [*words, "hardware=cpu"]

    def task(cfg: DictConfig) -> int:
        cfg = settled(cfg)
        plan = make_plan(cfg)
        plan["remedy"] = [] if plan["fits"] else find_remedy(cfg)
        print_plan(plan, console)
        if cfg.json is not None:
            Path(cfg.json).write_text(json.dumps(plan, indent=1))
            console.print(f"json: {cfg.json}", soft_wrap=True)
        return 0 if plan["fits"] else 1

    return run_app("plan", task, words)


def find_remedy(cfg: DictConfig) -> list[str]:
    """The first words with which a run fits that does not; none if there are no such.

    Each of three is tried alone, then all together: gradient checkpointing, half the token budget,
    and FSDP2 where there are several GPUs, or adapters where all weights train.
    """
    changes: dict[str, tuple[str, Any]] = {}  # words, and the key and value that they set
    if not cfg.model.gradient_checkpointing:
        changes["model.gradient_checkpointing=true"] = ("model.gradient_checkpointing", True)
    budget = max(stage.token_budget for stage in build_stages(cfg)) // 2
    changes[f"stage.token_budget={budget}"] = ("stage.token_budget", budget)
    if _gpus(cfg) > 1 and cfg.trainer.strategy != "fsdp":
        changes["trainer=fsdp"] = ("trainer.strategy", "fsdp")
    elif "rank" not in cfg.adapter:
        lora = compose_overrides("train", ["adapter=lora"]).adapter
        changes["adapter=lora"] = ("adapter", lora)
    for words in [*([word] for word in changes), list(changes)]:
        changed = cfg.copy()
        for word in words:
            OmegaConf.update(changed, *changes[word], merge=False)
        if make_plan(changed)["fits"]:
            return words
    return []


def make_plan(cfg: DictConfig) -> Plan:
    """The plan of a composed config: a step of each stage is run.

    Raises:
        UserError: for what cannot be planned.
    """
    gpus, on_gpu = _gpus(cfg), cfg.trainer.accelerator != "cpu"
    sharded = gpus > 1 and cfg.trainer.strategy == "fsdp"
    precision = checked_precision(cfg.trainer.precision, cfg.model.dtype)
    config, name = build(cfg.model.source).config(), cfg.model.source.get("path")
    if cfg.init_from is not None:
        exported = Path(cfg.init_from) / "model"
        name = str(exported) if exported.is_dir() else cfg.init_from
        config = find_config(name)
    lengths = Lengths(**{key: value for key, value in cfg.lengths.items() if key != "rows"})
    stages = build_stages(cfg)
    steps = {stage.name: _steps(cfg, stage) for stage in stages}
    found, heads = {}, 0
    with as_on_gpu() if on_gpu else nullcontext():
        backbone, processor, own = open_model(
            config,
            build(cfg.adapter),
            kernel=cfg.model.kernel,
            dtype=cfg.model.dtype,
            compute_dtype=torch.float32 if precision == "32-true" else torch.bfloat16,
            gradient_checkpointing=cfg.model.gradient_checkpointing,
            **{key: cfg.model[key] for key in ("max_length", "min_pixels", "max_pixels")},
        )
        for stage in stages:
            share = math.ceil(stage.batch_size / gpus)
            module, batches = make_step(stage, backbone, processor, lengths, rows=share)
            step = run_step(module, batches, weights=module.gathered_dtype if sharded else None)
            memory = _sharded(module, step.working, gpus) if sharded else step.memory
            gaps = round(cfg.assume.slack * memory[ACTIVATIONS])
            context = round(cfg.assume.context_gib * GIB)
            seconds = step.count.seconds(cfg.hardware.tflops, cfg.hardware.bandwidth)
            found[stage.name] = {
                "steps": steps[stage.name],
                "tokens_per_step": gpus * sum(batch.num_tokens for batch in batches),
                "chunks_per_gpu": len(batches),
                "memory_bytes": memory | {"context (assumed)": context, "gaps (assumed)": gaps},
                **{f"{k}_per_step_and_gpu": n for k, n in step.count.total._asdict().items()},
                "operators": {k: c._asdict() for k, c in step.count.by_operator().items()},
                "seconds_per_step": seconds,
                "hours": steps[stage.name] * seconds / 3600,
            }
            heads = max(heads, _numel(module.parameters()) - _numel(backbone.parameters()))
    adapters = _numel(backbone.parameters()) - own
    trained = _numel(p for p in backbone.parameters() if p.requires_grad)
    hours = math.fsum(stage["hours"] for stage in found.values())
    fullest = max(sum(stage["memory_bytes"].values()) for stage in found.values())
    saves = "with" if cfg.model.gradient_checkpointing else "without"
    return {
        "model": name or f"a small {config.model_type} with random weights",
        "setup": f"{gpus} x {cfg.hardware.name} "
        f"({'FSDP2' if sharded else 'replicated' if gpus > 1 else 'one process'}), "
        f"{'adapters train' if adapters else 'full fine-tuning'}, {precision}, "
        f"{saves} gradient checkpointing",
        "fits": fullest <= cfg.hardware.memory_gib * GIB,
        "hardware": cfg.hardware.name,
        "hardware_memory_gib": cfg.hardware.memory_gib,
        "gpus": gpus,
        "parameters": {"model": own, "adapters": adapters, "trainable": trained, "heads": heads},
        "stages": found,
        "hours": hours,
        "gpu_hours": gpus * hours,
        "disk_bytes": {
            # Weights and both moments; the new file is whole before the old one goes.
            "checkpoints": 2 * 3 * (trained + heads) * FLOAT32,
            "exported model": own * DTYPES[cfg.model.dtype].itemsize,
        },
        "assumed": asdict(lengths),
    }


def _sharded(module: StageModule, working: int, gpus: int) -> dict[str, int]:
    """Memory with FSDP2, which cannot run on tensors without values: ranks tell each other how many
    batches each has. What is split is divided by the GPUs. Whole are the weights in no block and
    three blocks (one runs, one arrives, the buffer that it arrives in), and a block's gradients
    before and while they are reduced.

    Args:
        module: its weights in the type in which they are gathered.
        working: bytes of activations and of a batch.
    """
    parameters, blocks = list(module.parameters()), module.backbone.blocks
    trained = FLOAT32 * _numel(p for p in parameters if p.requires_grad)
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    learnt = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
    reduced = max(sum(p.nbytes + p.numel() * FLOAT32 for p in own) for own in learnt)
    outside = sum(p.nbytes for p in parameters) - sum(sizes)
    return {
        WEIGHTS: (frozen + trained) // gpus,
        GRADIENTS: trained // gpus,
        OPTIMIZER: 2 * trained // gpus,
        ACTIVATIONS: working,
        "gathered blocks (assumed)": outside + 3 * max(sizes) + reduced,
    }


def _numel(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _gpus(cfg: DictConfig) -> int:
    """`gpus`, or what the trainer says."""
    if cfg.gpus is None and not isinstance(cfg.trainer.devices, int):
        raise UserError(f"how many GPUs? trainer.devices is {cfg.trainer.devices}; write gpus=8")
    gpus = int(cfg.gpus or cfg.trainer.devices * cfg.trainer.num_nodes)
    if gpus > 1 and str(cfg.trainer.strategy) == "auto":
        raise UserError(f"gpus={gpus} needs a trainer for several: trainer=ddp or trainer=fsdp")
    return gpus


def _steps(cfg: DictConfig, stage: Stage) -> int:
    """Optimizer steps, for at most as many rows as the data's own limits and the stage's allow."""
    rows = cfg.lengths.rows
    parts = cfg.data.get("stages")
    data = cfg.data if parts is None else parts.get(stage.name)
    if rows is None and data is not None and not OmegaConf.is_missing(data, "subsets"):
        captions = data.get("caption_subsets") if stage.describing else None
        subsets = data.get("subsets") if captions is None else captions
        limits = [n for n in (data.get("max_rows"), stage.max_rows_per_subset) if n is not None]
        rows = len(subsets) * min(limits) if subsets and limits else None
    if stage.steps is None and rows is None:
        raise UserError(
            f"stage {stage.name} counts epochs; say of how many rows: lengths.rows=100000"
        )
    return stage.count_steps(rows or 0)


# ---- for a terminal of 80 columns ----


def print_plan(plan: Plan, console: Console) -> None:
    """Print the whole plan, the verdict last."""
    told = partial(console.print, highlight=False)
    told(f"[bold]{escape(plan['model'])}[/bold]", soft_wrap=True)
    told(plan["setup"])
    parameters = (f"{part} {n / 1e6:,.2f}" for part, n in plan["parameters"].items() if n)
    told(f"Parameters in millions: {', '.join(parameters)}\n")

    stages, memory = plan["stages"], [stage["memory_bytes"] for stage in plan["stages"].values()]
    rows = [["", *stages]]
    for kind in dict.fromkeys(kind for kinds in memory for kind in kinds):
        rows.append([kind, *(_number(kinds.get(kind, 0) / GIB) for kinds in memory)])
    sums = [sum(kinds.values()) / GIB for kinds in memory]
    rows.append(["all", *map(_number, sums)])
    told(plain_table("GiB of each GPU at the peak", rows))

    rows = [["", *stages]]
    for label, key, unit in (
        ("tokens of all GPUs", "tokens_per_step", None),
        ("batches", "chunks_per_gpu", None),
        ("TFLOP", "flops_per_step_and_gpu", 1e12),
        ("GB read and written", "bytes_per_step_and_gpu", 1e9),
        ("kernels", "kernels_per_step_and_gpu", None),
        ("seconds", "seconds_per_step", None),
        ("steps", "steps", None),
        ("hours", "hours", None),
    ):
        values = (stage[key] if unit is None else stage[key] / unit for stage in stages.values())
        rows.append([label, *map(_number, values)])
    told(plain_table("A step on each GPU", rows))

    hours, disk = (plan["hours"], plan["gpu_hours"]), plan["disk_bytes"].items()
    told("All stages: {} hours, {} GPU hours".format(*map(_number, hours)))
    told("Disk: " + ", ".join(f"{part} {size / GIB:.2f} GiB" for part, size in disk))
    assumed = plan["assumed"]
    visual = assumed["image_tokens"] or "as many as model.max_pixels allows"
    told(
        f"Assumed: {assumed['text']} text tokens a side, {assumed['images_per_query']:g} images a "
        f"query and {assumed['images_per_positive']:g} a positive, visual tokens of an image: "
        f"{visual}, {assumed['negatives']} hard negatives; all rows alike (lengths.*).\n"
        "Hours are a lower bound: each operation at the data sheet's peak of its type or of the "
        "memory, whichever takes longer, one after the other; no exchange between GPUs, no "
        "waiting for data, no validation (docs/plan.md)."
    )
    needed, name = max(zip(sums, stages, strict=True))
    verdict = "[green]It fits[/green]" if plan["fits"] else "[red]It does not fit[/red]"
    limit = plan["hardware_memory_gib"]
    told(f"{verdict}: {needed:.1f} of {limit:g} GiB in {name}, the fullest stage.")
    if plan["remedy"]:
        told(f"It would with  [bold]{' '.join(plan['remedy'])}[/bold]")
    elif not plan["fits"]:
        told("Checkpointing, half the token budget, FSDP2 or adapters are not enough.")


def _number(value: float) -> str:
    """Three significant digits, whole numbers in full, and nothing for what is not there."""
    if value == 0:
        return ""
    if value >= 100 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else "< 0.01"
