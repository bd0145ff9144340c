"""A trained model in, a Hugging Face folder out: weights, processor and `cocoa.json`.

`cocoa.json` holds what the vectors depend on beside the weights, where the model comes from, and a
fingerprint: vectors of fixed inputs, which loading must reproduce.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers.utils import PROCESSOR_NAME

from cocoa_pl.attention import TEXT_ATTENTION, VISION_ATTENTION
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.export.chat_template import chat_template
from cocoa_pl.export.images_only import processor_class
from cocoa_pl.exported import DESCRIPTION, FORMAT
from cocoa_pl.fingerprint import take_fingerprint
from cocoa_pl.models.adapters import merged

CHAT_TEMPLATE = "chat_template.jinja"

log = logging.getLogger(__name__)


def export(embedder: Embedder, folder: Path, *, lineage: Sequence[dict[str, Any]]) -> Embedder:
    """Write the folder whole or not at all; adapters are merged into the weights, which are rounded
    to the type that the model computes in.

    Plain transformers can load it, and reads the bidirectional policy from `text_config.is_causal`.

    Args:
        lineage: one entry for each stage that made the weights.

    Returns:
        The embedder as exported: what is scored is what is handed over.
    """
    plain = merged(embedder.backbone)
    for parameter in plain.stock.parameters():  # not buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(plain.compute_dtype)
    whole = Embedder(plain, embedder.processor, embedder.policy)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / "model"
        _save_weights(plain.stock, fresh, causal=embedder.policy.causal)
        save_inputs(embedder.processor, plain.stock.config.model_type, fresh)
        processor = embedder.processor
        described = {
            "format": FORMAT,
            "policy": embedder.policy.to_dict(),
            "pooling": "eos",
            "normalize": True,
            "eos_token_id": processor.eos_id,
            "mask_token_id": processor.mask_id,
            "max_length": processor.max_length,
            "min_pixels": processor.min_pixels,
            "max_pixels": processor.max_pixels,
            "dtype": str(plain.stock.dtype).removeprefix("torch."),
            "lineage": list(lineage),
            "fingerprint": take_fingerprint(whole.encode).tolist(),
        }
        (fresh / DESCRIPTION).write_text(json.dumps(described, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    log.info("exported %s", folder)
    return whole


def save_inputs(processor: Processor, model_type: str, folder: Path) -> None:
    """All that plain transformers needs to make a model's input as this project does: the bounds of
    images and texts that the model was trained with, a tokenizer that appends EOS, also to texts
    that it cuts, and a template that puts images first.
    """
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.model_max_length = processor.max_length
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}",
        pair=f"$A $B {tokenizer.eos_token}",
        special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
    )
    tokenizer.save_pretrained(folder)
    image_processor = copy.deepcopy(processor.image_processor)
    image_processor.size = {
        "shortest_edge": processor.min_pixels,
        "longest_edge": processor.max_pixels,
    }
    image_processor.save_pretrained(folder)
    (folder / CHAT_TEMPLATE).write_text(chat_template(list(tokenizer.added_tokens_encoder)))
    if name := processor_class(model_type):
        (folder / PROCESSOR_NAME).write_text(json.dumps({"processor_class": name}, indent=1))


def lineage_of(path: str) -> list[dict[str, Any]]:
    """The stages behind an exported folder; empty for a model that this project did not export."""
    described = Path(path) / DESCRIPTION
    if not described.is_file():
        return []
    lineage: list[dict[str, Any]] = json.loads(described.read_text())["lineage"]
    return lineage


def _save_weights(stock: Any, folder: Path, *, causal: bool) -> None:
    """Save under stock attention names: the project's own mean nothing to plain transformers."""
    stock.config.text_config.is_causal = causal
    stock.set_attn_implementation("sdpa")
    try:
        stock.save_pretrained(folder)
    finally:
        stock.set_attn_implementation(TEXT_ATTENTION)
        stock.model.visual.config._attn_implementation = VISION_ATTENTION
