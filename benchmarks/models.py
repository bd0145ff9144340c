"""Models with random weights as `python train.py` exports them, and rows for them: scenes of real
handwritten digits with their captions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.measure import TABLE
from cocoa_pl.attention.command import load_policy
from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import compose_overrides
from cocoa_pl.data.digit_scenes import caption, compose, draw, layouts
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.export.folder import export
from cocoa_pl.export.parity import images_only
from cocoa_pl.export.sentence_transformers import write_sentence_transformers
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import load
from cocoa_pl.run import build_stages, make_processors
from cocoa_pl.stages.base import StageModule

Row = tuple[Image.Image, str]

ASKED = "Find the caption of the image"
LR = 1e-5


def draw_rows(count: int, *, side: int) -> list[Row]:
    """Different scenes, enlarged to `side` pixels a side, with their captions."""
    rng = np.random.default_rng(0)
    scenes = [compose(one, split="train", rng=rng) for one in layouts("train")[:count]]
    pictures = [Image.fromarray(draw(scene)).convert("RGB") for scene in scenes]
    return [
        (picture.resize((side, side), Image.Resampling.BICUBIC), caption(scene.layout))
        for picture, scene in zip(pictures, scenes, strict=True)
    ]


@cache
def _exported(model: str, dtype: torch.dtype) -> tempfile.TemporaryDirectory[str]:
    scratch = tempfile.TemporaryDirectory(prefix="benchmarks-")  # until the process ends
    name = str(dtype).removeprefix("torch.")
    overrides = [f"cache_dir={scratch.name}", f"model.dtype={name}", *TABLE["models"][model]]
    cfg = compose_overrides("train", overrides)
    folder = build(cfg.model.source).folder(lambda: [text for _, text in draw_rows(200, side=56)])
    loaded = load(folder, kernel="auto", dtype=name, gradient_checkpointing=False)
    processor, _ = make_processors(cfg, loaded)
    embedder = Embedder(loaded.backbone, processor, load_policy("bidirectional"))
    embedder = export(embedder, Path(scratch.name) / "model", lineage=[])
    write_sentence_transformers(Path(scratch.name) / "model", dim=embedder.dim)
    return scratch


def exported(model: str, dtype: torch.dtype) -> str:
    """The folder of a model of table.yaml, as `python train.py` and `cocoa export` write it."""
    return f"{_exported(model, dtype).name}/model"


def sentence_transformer(folder: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same folder as sentence-transformers opens it."""
    from sentence_transformers import SentenceTransformer

    with images_only():
        return SentenceTransformer(folder, device=str(device), model_kwargs={"dtype": dtype})


def unused(processor: Processor) -> Processor:
    """A processor like this one that remembers no text: what is timed again is tokenized again."""
    return Processor(
        processor.tokenizer,
        processor.image_processor,
        max_length=processor.max_length,
        min_pixels=processor.min_pixels,
        max_pixels=processor.max_pixels,
        num_token_rows=processor.mask_id + 1,
    )


def asking(picture: Image.Image) -> Item:
    """A picture and what is asked of it."""
    return Item(f"{IMAGE_SLOT}\n{ASKED}", (picture,))


def stage_module(
    kind: str, overrides: Sequence[str], backbone: Backbone, processor: Processor, budget: int
) -> StageModule:
    """A stage's module as its config has it, ready for steps outside of a trainer.

    Args:
        budget: tokens of a batch.
    """
    cfg = compose_overrides("train", overrides)
    (stage,) = (stage for stage in build_stages(cfg) if stage.name == kind)
    stage = replace(stage, token_budget=budget)
    device = backbone.device
    module: Any = stage.make_module(build(cfg.adapter)(backbone), processor, steps=1, seed=0)
    module.to(device).manual_backward = lambda loss: loss.backward()
    return module


def optimizer_of(module: nn.Module) -> torch.optim.AdamW:
    """The same on both sides; on weights that train."""
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(weights, lr=LR, fused=True)


def gradients_of(module: nn.Module) -> list[torch.Tensor]:
    """In the order of names, which all ways to wrap a model give to its parts alike."""
    found = {}
    for name, parameter in module.named_parameters():
        places = [name.find(part) for part in ("visual.", "language_model.") if part in name]
        if parameter.grad is not None:
            found[name[min(places) :]] = parameter.grad
    return [found[name] for name in sorted(found)]
