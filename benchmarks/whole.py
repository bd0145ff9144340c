"""Whole steps and vectors, from pictures and texts on: what a data worker does is inside the time
of both sides, although it runs beside the step elsewhere. Models have random weights, as `python
train.py` exports them; rows are scenes of real handwritten digits with their captions.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

from benchmarks.measure import TABLE, Results, Task
from benchmarks.parts import IGNORED, dense_masks
from cocoa_pl.attention.command import load_policy
from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import compose_overrides
from cocoa_pl.data.batch import VISUAL, Sample
from cocoa_pl.data.digit_scenes import caption, compose, draw, layouts
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.processor import Processor, tokenized
from cocoa_pl.embedder import Embedder
from cocoa_pl.export.folder import export, write_sentence_transformers
from cocoa_pl.export.parity import images_only
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import load
from cocoa_pl.run import build_stages, make_processors
from cocoa_pl.stages.base import StageModule

ASKED = "Find the caption of the image"
LR = 1e-5
MINI_BATCH = 32  # sentence-transformers' own, in training and in `encode`
TEMPERATURE = 0.07


def contrast_step(
    *, model: str, pairs: int, side: int, budget: int, dtype: torch.dtype, device: torch.device
) -> Task:
    """One optimizer step on pictures and their captions; all weights train, in float32.

    Args:
        budget: tokens of a batch of ours.
        dtype: of products.
    """
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import batch_to_device

    folder, rows = exported(model, dtype), draw_rows(pairs, side=side)
    embedder = Embedder.load(folder, device=str(device))
    changes = [
        f"stage.contrast.module.temperature={TEMPERATURE}",
        "stage.contrast.module.mask_false_negatives=false",
    ]
    module = stage_module("contrast", changes, embedder.backbone, embedder.processor, budget)
    collate, optimizer = module.collator(validating=False), optimizer_of(module)

    def ours() -> Results:
        optimizer.zero_grad()
        process = unused(embedder.processor)
        samples = [
            [
                process(asking(picture), None, key=2 * n, row_id=str(n), role=0),
                process(Item(text), None, key=2 * n + 1, row_id=str(n), role=1),
            ]
            for n, (picture, text) in enumerate(rows)
        ]
        loss = module.accumulate(collate(samples))["loss"]
        optimizer.step()
        return {"loss": [loss], "gradients": gradients_of(module)}

    theirs = sentence_transformer(folder, device, torch.float32).train()
    ranking = CachedMultipleNegativesRankingLoss(
        theirs, scale=1 / TEMPERATURE, mini_batch_size=MINI_BATCH
    )
    their_optimizer = optimizer_of(theirs)
    queries = [{"image": picture, "text": ASKED} for picture, _ in rows]
    positives = [text for _, text in rows]

    def peer() -> Results:
        their_optimizer.zero_grad()
        features = [theirs.preprocess(some) for some in (queries, positives)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = ranking([batch_to_device(one, device) for one in features], torch.arange(pairs))
            loss.backward()  # embeds again
        their_optimizer.step()
        return {"loss": [loss.detach()], "gradients": gradients_of(theirs)}

    models = (embedder.backbone.stock.model.language_model, theirs[0].model.language_model)
    return Task(pairs, ours, peer, models=models)


def encode(*, model: str, rows: int, side: int, dtype: torch.dtype, device: torch.device) -> Task:
    """Vectors of pictures with a question and of captions, in turns, by both front doors."""
    folder = exported(model, dtype)
    embedder = Embedder.load(folder, device=str(device))
    items: list[Any] = []
    for picture, text in draw_rows(rows, side=side):
        items += [{"image": picture, "text": ASKED}, text]

    def ours() -> Results:
        fresh = Embedder(embedder.backbone, unused(embedder.processor), embedder.policy)
        return {"vectors": [torch.from_numpy(fresh.encode(items, threads=0))]}

    theirs = sentence_transformer(folder, device, dtype).eval()

    def peer() -> Results:
        vectors = theirs.encode(items, batch_size=MINI_BATCH, show_progress_bar=False)
        return {"vectors": [torch.from_numpy(vectors)]}

    models = (embedder.backbone.stock.model.language_model, theirs[0].model.language_model)
    return Task(len(items), ours, peer, models=models)


def reconstruct_step(
    *, model: str, rows: int, side: int, budget: int, dtype: torch.dtype, device: torch.device
) -> Task:
    """One optimizer step of the EOS bridge: a caption, 70 % hidden, from a picture."""
    folder = exported(model, dtype)
    embedder = Embedder.load(folder, device=str(device))
    module = stage_module("reconstruct", [], embedder.backbone, embedder.processor, budget)
    masking, collate = module.masking, module.collator(validating=False)
    optimizer, drawn = optimizer_of(module), draw_rows(rows, side=side)
    assert masking is not None

    def samples() -> list[Sample]:
        process = unused(embedder.processor)
        return [
            masking(process(asking(p), c, key=n, row_id=str(n)), np.random.default_rng(n))
            for n, (p, c) in enumerate(drawn)
        ]

    def ours() -> Results:
        optimizer.zero_grad()
        loss = module.accumulate(collate([[sample] for sample in samples()]))["loss"]
        optimizer.step()
        return {"loss": [loss], "gradients": gradients_of(module)}

    stock: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    stock.to(device).train()
    their_optimizer, given = optimizer_of(stock), samples()
    see = embedder.processor.image_processor

    def peer() -> Results:
        their_optimizer.zero_grad()
        pictures = [see([np.asarray(p)], return_tensors="pt") for p, _ in drawn]
        inputs, real, labels = padded(given, pad_id=embedder.processor.eos_id, device=device)
        grids = torch.cat([one["image_grid_thw"] for one in pictures]).to(device)
        positions, _ = stock.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=grids,
            attention_mask=real,
        )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = stock(
                **inputs,
                pixel_values=torch.cat([one["pixel_values"] for one in pictures]).to(device),
                image_grid_thw=grids,
                position_ids=positions,
                use_cache=False,
            ).logits
        shifted = logits[:, :-1].float().flatten(0, 1)
        loss = cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        their_optimizer.step()
        return {"loss": [loss.detach()], "gradients": gradients_of(stock)}

    models = (embedder.backbone.stock.model.language_model, stock.model.language_model)
    return Task(rows, ours, peer, models=models)


def padded(
    samples: list[Sample], *, pad_id: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Rows padded on the right to the longest, with a dense mask, as CoCoA's code makes them.

    Returns:
        Inputs of a stock model, the mask (B, 1, N, N) True where a token sees another; (B, N) 1
        where there is a token; and labels (B, N), `IGNORED` where nothing is hidden.
    """
    lengths = torch.tensor([sample.segment_lengths for sample in samples])
    mask = dense_masks(load_policy("eos_bridge"), lengths)
    labels = torch.full((len(samples), mask.shape[-1]), IGNORED)
    for sample, own in zip(samples, labels, strict=True):
        own[sample.hidden] = torch.from_numpy(sample.targets)
    ids = [torch.from_numpy(sample.input_ids) for sample in samples]
    visual = [torch.from_numpy(sample.kinds == VISUAL).long() for sample in samples]
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id).to(device),
        "mm_token_type_ids": pad_sequence(visual, batch_first=True).to(device),
        "attention_mask": mask.to(device),
    }
    real = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return inputs, real.to(device), labels.to(device)


# --- Models and rows -------------------------------------------------------------------------


def draw_rows(count: int, *, side: int) -> list[tuple[Image.Image, str]]:
    """Different scenes, enlarged to `side` pixels a side, with their captions."""
    rng = np.random.default_rng(0)
    scenes = [compose(one, split="train", rng=rng) for one in layouts("train")[:count]]
    pictures = [Image.fromarray(draw(scene)).convert("RGB") for scene in scenes]
    return [
        (picture.resize((side, side), Image.Resampling.BICUBIC), caption(scene.layout))
        for picture, scene in zip(pictures, scenes, strict=True)
    ]


@cache
def exported(model: str, dtype: torch.dtype) -> str:
    """The folder of a model of table.yaml, as `python train.py` and `cocoa export` write it; until
    the process ends.
    """
    scratch = tempfile.mkdtemp(prefix="benchmarks-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    name, out = str(dtype).removeprefix("torch."), Path(scratch) / "model"
    overrides = [f"cache_dir={scratch}", f"model.dtype={name}", *TABLE["models"][model]]
    cfg = compose_overrides("train", overrides)
    folder = build(cfg.model.source).folder(lambda: [text for _, text in draw_rows(200, side=56)])
    loaded = load(folder, kernel="auto", dtype=name, gradient_checkpointing=False)
    processor, _ = make_processors(cfg, loaded)
    embedder = Embedder(loaded.backbone, processor, load_policy("bidirectional"))
    write_sentence_transformers(out, dim=export(embedder, out, lineage=[]).dim)
    return str(out)


def sentence_transformer(folder: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same folder as sentence-transformers opens it."""
    from sentence_transformers import SentenceTransformer

    with images_only():
        return SentenceTransformer(folder, device=str(device), model_kwargs={"dtype": dtype})


def unused(processor: Processor) -> Processor:
    """The processor, which has forgotten all texts: what is timed again is tokenized again."""
    tokenized.cache_clear()
    return processor


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
