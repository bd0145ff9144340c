"""`cocoa plan`: memory, time and disk of a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import AutoConfig, PretrainedConfig

from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import CONFIGS, compose_overrides, run_app
from cocoa_pl.config.saved import settled
from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import LowRank
from cocoa_pl.models.published import find_config
from cocoa_pl.models.tiny import TWINS
from cocoa_pl.planning.families import model_shape
from cocoa_pl.planning.memory import Setup
from cocoa_pl.planning.plan import Plan
from cocoa_pl.planning.samples import Lengths, grid_of, grid_of_tokens
from cocoa_pl.planning.shapes import ModelShape
from cocoa_pl.planning.stage_plan import StagePlan
from cocoa_pl.planning.table import print_plan
from cocoa_pl.planning.tuning import Adapter
from cocoa_pl.planning.verdict import Hardware, remedies
from cocoa_pl.run import build_stages
from cocoa_pl.stages.recipe import Stage
from cocoa_pl.stages.trainer import checked_precision

WIDTHS = {"float32": 4, "bfloat16": 2}


def run(words: Sequence[str], console: Console) -> int:
    """Run the command line's words; the exit status is 0 if training fits and 1 if not."""
    if "trainer=cpu" in words and not any(word.startswith("hardware=") for word in words):
        words = [*words, "hardware=cpu"]

    def task(cfg: DictConfig) -> int:
        plan = make_plan(settled(cfg))
        print_plan(plan, console)
        if cfg.json is not None:
            Path(cfg.json).write_text(json.dumps(plan.to_dict(), indent=1))
            console.print(f"json: {cfg.json}", soft_wrap=True)
        return 0 if plan.fits else 1

    return run_app("plan", task, words)


def make_plan(cfg: DictConfig) -> Plan:
    """The plan of a composed config, with remedies if it does not fit.

    Raises:
        UserError: for what cannot be planned.
    """
    config, title = _model(cfg)
    shape = model_shape(config)
    setup = _setup(cfg, shape)
    lengths = _lengths(cfg, shape)
    hardware = _hardware(cfg, cfg.hardware)
    stages = [
        StagePlan(stage, setup, lengths, cfg.model.max_length, _rows(cfg, stage))
        for stage in build_stages(cfg)
    ]
    found = []
    if not all(hardware.fits(stage) for stage in stages):
        files = [OmegaConf.load(path) for path in (CONFIGS / "hardware").glob("*.yaml")]
        others = sorted((_hardware(cfg, file) for file in files), key=lambda gpu: gpu.memory_gib)
        found = remedies(stages, hardware, lora=_lora(), others=others)
    known = [rows for stage in stages if (rows := stage.rows_of_epoch) is not None]
    return Plan(
        title=title,
        setup=setup,
        stages=stages,
        hardware=hardware,
        mfu=cfg.mfu,
        lengths=lengths,
        rows=max(known, default=None),
        workers=cfg.num_workers,
        remedies=found,
    )


def _model(cfg: DictConfig) -> tuple[PretrainedConfig, str]:
    """The architecture, and what to call it; nothing is downloaded."""
    source = cfg.model.source
    if cfg.init_from is not None:
        exported = Path(cfg.init_from) / "model"
        path = str(exported) if exported.is_dir() else cfg.init_from
        return find_config(path), path
    if "path" in source:
        return find_config(source.path), source.path
    values: dict[str, Any] = build(source).values  # it refuses a family that it cannot make
    output = TWINS[values["family"]].output_field
    config: PretrainedConfig = AutoConfig.for_model(
        values["family"],
        text_config={
            **values["text"],
            "vocab_size": values["vocabulary_size"] + values["reserved_rows"],
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={**values["vision"], output: values["text"]["hidden_size"]},
        tie_word_embeddings=True,
    )
    return config, f"a small {values['family']} with random weights"


def _setup(cfg: DictConfig, shape: ModelShape) -> Setup:
    precision, dtype = cfg.trainer.precision, cfg.model.dtype
    if checked_precision(precision, dtype) != checked_precision(None, dtype):
        raise UserError(
            f"trainer.precision={precision} cannot be planned with model.dtype={dtype}; leave it "
            "at null, which follows model.dtype"
        )
    gpus = _gpus(cfg)
    strategy = str(cfg.trainer.strategy)
    if gpus > 1 and strategy == "auto":
        raise UserError(f"gpus={gpus} needs a trainer for several: trainer=ddp or trainer=fsdp")
    on_gpu, kernel = cfg.trainer.accelerator != "cpu", cfg.model.kernel
    if kernel == "auto":  # every GPU of conf/hardware has flash attention
        kernel = "varlen" if on_gpu and cfg.model.dtype == "bfloat16" else "sdpa"
    return Setup(
        shape=shape,
        adapter=_adapter(build(cfg.adapter)),
        width=WIDTHS[cfg.model.dtype],
        checkpointing=cfg.model.gradient_checkpointing,
        sharded=strategy == "fsdp" and gpus > 1,
        gpus=gpus,
        kernel=kernel,
        on_gpu=on_gpu,
    )


def _gpus(cfg: DictConfig) -> int:
    """`gpus`, or what the trainer says."""
    if cfg.gpus is None:
        devices = cfg.trainer.devices
        if not isinstance(devices, int):
            raise UserError(f"how many GPUs? trainer.devices is {devices}; write gpus=8")
        return devices * int(cfg.trainer.num_nodes)
    return int(cfg.gpus)


def _adapter(made: Any) -> Adapter | None:
    if not isinstance(made, LowRank):
        return None
    return Adapter(
        rank=made.config.r,
        dropout=made.config.lora_dropout,
        use_dora=made.config.use_dora,
        lean=made.lean_dora,
        dropout_on_base=made.dropout_on_base,
        targets=made.target_modules,
    )


def _lora() -> Adapter:
    adapter = _adapter(build(compose_overrides("train", ["adapter=lora"]).adapter))
    assert adapter is not None
    return adapter


def _lengths(cfg: DictConfig, shape: ModelShape) -> Lengths:
    values, vision = cfg.lengths, shape.vision
    grid = grid_of(cfg.model.max_pixels, token_side=vision.patch_size * vision.merge_size)
    if values.image_tokens is not None:
        grid = grid_of_tokens(values.image_tokens)
    return Lengths(
        text=values.text,
        images_per_query=values.images_per_query,
        images_per_positive=values.images_per_positive,
        negatives=values.negatives,
        grid=grid,
        row_bytes=values.row_bytes,
        image_bytes=round(values.image_kib * 1024),
    )


def _hardware(cfg: DictConfig, values: Any) -> Hardware:
    return Hardware(
        name=values.name,
        memory_gib=values.memory_gib,
        tflops=dict(values.tflops),
        context_gib=cfg.assume.context_gib,
        slack=cfg.assume.slack,
    )


def _rows(cfg: DictConfig, stage: Stage) -> int | None:
    """Training rows of a stage, at most: what the data's own limits and the stage's allow."""
    if cfg.lengths.rows is not None:
        return int(cfg.lengths.rows)
    parts = cfg.data.get("stages")
    data = cfg.data if parts is None else parts.get(stage.name)
    if data is None or OmegaConf.is_missing(data, "subsets") or not data.get("subsets"):
        return None
    captions = data.get("caption_subsets") if stage.describing else None
    subsets = data.subsets if captions is None else captions
    limits = [n for n in (data.get("max_rows"), stage.max_rows_per_subset) if n is not None]
    return len(subsets) * min(limits) if limits else None
