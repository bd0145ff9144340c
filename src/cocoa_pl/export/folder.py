"""Export a trained model as a Hugging Face folder: weights, processor and `cocoa.json`.

`cocoa.json` holds what the vectors depend on beside the weights, where the model comes from,
digests of all files, and a fingerprint: vectors of fixed inputs, which loading must reproduce.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.processors import TemplateProcessing
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES
from transformers.utils import PROCESSOR_NAME

from cocoa_pl.attention import TEXT_ATTENTION, VISION_ATTENTION
from cocoa_pl.data.items import template_source
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import merged
from cocoa_pl.models.exported import (
    CHANGED,
    DESCRIPTION,
    FORMAT,
    described_in,
    differences,
    take_fingerprint,
    write_description,
)

CHAT_TEMPLATE = "chat_template.jinja"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # in a chat template
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
MODULES = (  # stock ones, at their places in sentence-transformers 6 (https://sbert.net)
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)
WRITTEN_FOR = "6.0.0"  # the oldest release whose modules lie at these places

log = logging.getLogger(__name__)


def export(
    embedder: Embedder,
    folder: Path,
    *,
    lineage: Sequence[dict[str, Any]],
    settings: dict[str, Any] | None = None,
    rounding: float | None = None,
) -> Embedder:
    """Write the folder whole or not at all; adapters are merged into the weights, which are rounded
    to the type that the model computes in.

    Plain transformers can load it, and reads the bidirectional policy from `text_config.is_causal`.

    Args:
        lineage: one entry for each stage that made the weights.
        settings: what the model was trained with, for those who start from it; None if unknown.
        rounding: of a model that was exported before: how far it was then from the trained one.
            None measures it, on the inputs of the fingerprint.

    Returns:
        The embedder as exported: what is scored is what is handed over.

    Raises:
        UserError: as `replacing`.
    """
    trained = take_fingerprint(embedder.encode)
    plain = merged(embedder.backbone)
    for parameter in plain.stock.parameters():  # not buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(plain.compute_dtype)
    whole = Embedder(plain, embedder.processor, embedder.policy)
    fingerprint = take_fingerprint(whole.encode)
    if rounding is None:
        rounding = float(np.abs(fingerprint - trained).max())
    with replacing(folder) as fresh:
        stock: Any = plain.stock
        stock.config.text_config.is_causal = embedder.policy.causal
        stock.set_attn_implementation("sdpa")  # own names mean nothing to plain transformers
        try:
            stock.save_pretrained(fresh)
        finally:
            stock.set_attn_implementation(TEXT_ATTENTION)
            stock.model.visual.config._attn_implementation = VISION_ATTENTION
        processor = embedder.processor
        save_inputs(processor, stock.config.model_type, fresh)
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
            "dtype": str(stock.dtype).removeprefix("torch."),
            "lineage": list(lineage),
            "settings": settings,
            "rounding": rounding,
            "fingerprint": fingerprint.tolist(),
        }
        write_description(fresh, described)
    log.info("exported %s", folder)
    return whole


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A place to write to, which becomes `folder` at the end, whole or not at all; what is in
    `folder` by now and no export wrote goes along.

    Raises:
        UserError: for a file that an export wrote and that was changed since, or a user's own
            file that would be overwritten.
    """
    written = untouched(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        fresh, before = Path(scratch) / "new", Path(scratch) / "before"
        yield fresh
        if not folder.exists():
            fresh.rename(folder)
            return
        _carry_over(folder, fresh, written)
        with ExitStack() as undo:
            folder.rename(before)
            undo.callback(before.rename, folder)
            fresh.rename(folder)
            undo.pop_all()


def untouched(folder: Path) -> set[str]:
    """Files of a folder that exports wrote and may write again.

    Raises:
        UserError: if one of them was changed since.
    """
    described = described_in(folder)
    if not described:
        return set()
    for name, what in differences(folder, described):
        if what == CHANGED:
            raise UserError(
                f"{folder / name} {what} and would be overwritten; move it elsewhere, or export "
                "into another folder"
            )
    return {DESCRIPTION, *described["files"], *described["others"]}


def _carry_over(folder: Path, fresh: Path, own: set[str]) -> None:
    """Copy what no export wrote; empty folders too, as git has some."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        target = fresh / name
        if path.is_dir() and not path.is_symlink():
            if not any(file.startswith(f"{name}/") for file in own):
                target.mkdir(exist_ok=True)
        elif name not in own and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)
        elif name not in own:
            raise UserError(f"{path} is of no export and would be overwritten; move it elsewhere")


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
    # The template that `Embedder` and the readers of rows use, with the model's own image token:
    # images first, or where placeholders in a text stand, then the instruction (a system message)
    # and the text. EOS is not in it: the tokenizer appends it behind what is left of a cut text.
    special_tokens = list(tokenizer.added_tokens_encoder)  # not obeyed in a user's text
    template = template_source(image=IMAGE, special_tokens=special_tokens)
    (folder / CHAT_TEMPLATE).write_text(template)
    if name := PROCESSOR_MAPPING_NAMES.get(model_type):
        (folder / PROCESSOR_NAME).write_text(json.dumps({"processor_class": name}, indent=1))


def write_sentence_transformers(folder: Path, *, dim: int) -> None:
    """Make a folder that `export` wrote one of sentence-transformers, too, without code of this
    project: Transformer renders messages with the folder's chat template, Pooling takes the last
    token, which is EOS, and Normalize makes unit vectors.

    Args:
        dim: components of a vector.
    """
    try:
        release = version("sentence-transformers")  # which parity is checked with
    except PackageNotFoundError:
        release = WRITTEN_FOR
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(MODULES)
    ]
    for path, _ in MODULES[1:]:
        (folder / path).mkdir()
    files: dict[str, Any] = {
        "modules.json": modules,
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": release},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": FORWARD,
                "image": FORWARD,
                "message": {**FORWARD, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
            # PIL's exact pixels: torchvision's resizing rounds differently, vectors by up to 2e-3.
            # The newer name, backend, is refused by the video processor that loads beside it.
            "processor_kwargs": {"use_fast": False},
            "unpad_inputs": False,  # flattened texts would see each other's neighbours
        },
        "1_Pooling/config.json": {
            "embedding_dimension": dim,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
