"""An exported folder in, how far its vectors are from the trained model's, tool by tool, out.

Everything is computed in float32 on the CPU, so that what differs is not rounding: pixels, tokens,
positions, attention, pooling.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.export.images_only import has_torchvision, images_only

TOLERANCE = 1e-4  # largest difference of a vector's component

Sample = dict[str, Any]  # text, image, or both in any order
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Compared:
    """How far one way of computing the vectors is from the trained model's.

    Attributes:
        way: how the vectors were computed.
        difference: the largest of a component; None if it was not computed.
        note: what a reader should know, such as why it was not computed.
        tolerance: what the difference may be.
    """

    way: str
    difference: float | None
    note: str = ""
    tolerance: float = TOLERANCE


def samples(max_length: int) -> list[Sample]:
    """Texts and pictures of several lengths and shapes, in both orders, one cut to `max_length`."""
    random = np.random.default_rng(0)
    wide, tall, tiny = (
        Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
        for height, width in ((90, 140), (230, 61), (9, 9))
    )
    return [
        {"text": "a seven at the top left"},
        {"text": "Eine ältere Frau — 好 👋 liest"},
        {"image": wide},
        {"image": tiny},
        {"text": "what is in this picture?", "image": tall},
        {"image": wide, "text": "Find the same scene in the evening"},
        {"text": "again and again " * max_length},
    ]


def compare(
    trained: Embedder, folder: Path, *, with_sentence_transformers: bool
) -> tuple[Compared, ...]:
    """The trained model against its exported folder, read by each tool.

    Args:
        trained: gives the vectors that the others must give; as `export` hands it back, its weights
            rounded to the type that is exported. It computes in float32 on the CPU afterwards.
    """
    cases = samples(trained.processor.max_length)
    expected = _in_float32(trained).encode(cases)
    ways: dict[str, Callable[[], Vectors]] = {
        "Embedder": lambda: _in_float32(Embedder.load(str(folder), device="cpu")).encode(cases),
        "transformers": lambda: by_transformers(folder, cases),
    }
    note = "" if has_torchvision() else "without torchvision, inside images_only()"
    notes = {"transformers": note, "sentence-transformers": note}
    missing = with_sentence_transformers and not _installed("sentence_transformers")
    if with_sentence_transformers and not missing:
        ways["sentence-transformers"] = lambda: by_sentence_transformers(folder, cases)
    found = []
    for way, vectors in ways.items():
        difference = float(np.abs(vectors() - expected).max())
        found.append(Compared(way, difference, notes.get(way, "")))
        gc.collect()  # one model in memory at a time, beside the trained one
    if missing:
        why = "not installed: pip install 'cocoa_pl[sentence-transformers]'"
        found.append(Compared("sentence-transformers", None, why))
    return tuple(found)


def check(compared: Sequence[Compared]) -> None:
    """Refuse a folder that another tool would read wrongly.

    Raises:
        UserError: naming the way that differs by more than it may, or gives no number.
    """
    for one in compared:
        if one.difference is not None and not one.difference <= one.tolerance:
            raise UserError(
                f"{one.way} does not give the trained model's vectors: they differ by "
                f"{one.difference:.2g}, more than {one.tolerance:g}; nothing was exported"
            )


def by_transformers(folder: Path, cases: Sequence[Sample]) -> Vectors:
    """What the model card shows: stock classes, all cases in one padded batch."""
    with images_only():
        processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    conversations = [
        [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in case.items()]}]
        for case in cases
    ]
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"text_kwargs": {"padding": True, "truncation": True}},
    )
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    last = inputs["attention_mask"].sum(dim=1) - 1
    vectors: Vectors = normalize(states[torch.arange(len(last)), last], dim=-1).numpy()
    return vectors


def by_sentence_transformers(folder: Path, cases: Sequence[Sample]) -> Vectors:
    """What the model card shows."""
    from sentence_transformers import SentenceTransformer

    with images_only():
        model = SentenceTransformer(
            str(folder), device="cpu", model_kwargs={"dtype": torch.float32}
        )
    vectors: Vectors = model.encode(list(cases), batch_size=len(cases), show_progress_bar=False)
    return vectors


def _in_float32(embedder: Embedder) -> Embedder:
    embedder.backbone.to("cpu")
    embedder.backbone.stock.to(torch.float32)
    embedder.backbone.compute_dtype = torch.float32
    return embedder


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
