"""Whole steps and vectors, from pictures and texts on: what a data worker does is inside the time
of both sides, although it runs beside the step elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

from benchmarks.measure import Results, Task
from benchmarks.models import (
    ASKED,
    asking,
    draw_rows,
    exported,
    gradients_of,
    optimizer_of,
    sentence_transformer,
    stage_module,
    unused,
)
from cocoa_pl.attention import dense_mask
from cocoa_pl.attention.command import load_policy
from cocoa_pl.data.batch import VISUAL, Sample
from cocoa_pl.data.items import Item
from cocoa_pl.embedder import Embedder

MINI_BATCH = 32  # sentence-transformers' own, in training and in `encode`
TEMPERATURE = 0.07
IGNORED = -100  # cross_entropy's own mark


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
                process(Item(caption), None, key=2 * n + 1, row_id=str(n), role=1),
            ]
            for n, (picture, caption) in enumerate(rows)
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
    positives = [caption for _, caption in rows]

    def peer() -> Results:
        their_optimizer.zero_grad()
        features = [theirs.preprocess(some) for some in (queries, positives)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = ranking([batch_to_device(one, device) for one in features], torch.arange(pairs))
            loss.backward()  # embeds again
        their_optimizer.step()
        return {"loss": [loss.detach()], "gradients": gradients_of(theirs)}

    text = (embedder.backbone.stock.model.language_model, theirs[0].model.language_model)
    return Task(pairs, ours, peer, models=text)


def encode(*, model: str, rows: int, side: int, dtype: torch.dtype, device: torch.device) -> Task:
    """Vectors of pictures with a question and of captions, in turns, by both front doors."""
    folder = exported(model, dtype)
    embedder = Embedder.load(folder, device=str(device))
    items: list[Any] = []
    for picture, caption in draw_rows(rows, side=side):
        items += [{"image": picture, "text": ASKED}, caption]

    def ours() -> Results:
        fresh = Embedder(embedder.backbone, unused(embedder.processor), embedder.policy)
        return {"vectors": [torch.from_numpy(fresh.encode(items, threads=0))]}

    theirs = sentence_transformer(folder, device, dtype).eval()

    def peer() -> Results:
        vectors = theirs.encode(items, batch_size=MINI_BATCH, show_progress_bar=False)
        return {"vectors": [torch.from_numpy(vectors)]}

    text = (embedder.backbone.stock.model.language_model, theirs[0].model.language_model)
    return Task(len(items), ours, peer, models=text)


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

    text = (embedder.backbone.stock.model.language_model, stock.model.language_model)
    hidden = sum(len(sample.targets) for sample in given)
    slots = rows * max(sample.num_tokens for sample in given)
    return Task(rows, ours, peer, models=text, facts={"head_rows": (hidden, slots)})


def padded(
    samples: list[Sample], *, pad_id: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Rows padded on the right to the longest, with a dense mask, as CoCoA's code makes them.

    Returns:
        Inputs of a stock model, the mask (B, 1, N, N) True where a token sees another; (B, N) 1
        where there is a token; and labels (B, N), `IGNORED` where nothing is hidden.
    """
    policy, longest = load_policy("eos_bridge"), max(sample.num_tokens for sample in samples)
    mask = torch.zeros(len(samples), 1, longest, longest, dtype=torch.bool)
    labels = torch.full((len(samples), longest), IGNORED)
    for sample, own_mask, own_labels in zip(samples, mask[:, 0], labels, strict=True):
        count = sample.num_tokens
        own_mask[:count, :count] = dense_mask(policy, torch.tensor([sample.segment_lengths]))
        own_mask[count:, count - 1] = True  # a row that sees nothing is NaN on a GPU
        own_labels[sample.hidden] = torch.from_numpy(sample.targets)
    ids = [torch.from_numpy(sample.input_ids) for sample in samples]
    visual = [torch.from_numpy(sample.kinds == VISUAL).long() for sample in samples]
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id).to(device),
        "mm_token_type_ids": pad_sequence(visual, batch_first=True).to(device),
        "attention_mask": mask.to(device),
    }
    real = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return inputs, real.to(device), labels.to(device)
