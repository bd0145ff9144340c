"""Compare the vectors that each tool reads from an exported folder with the trained model's.

Everything is computed in float32 on the CPU, so that what differs is not rounding: pixels, tokens,
positions, attention, pooling.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import FAMILIES

TOLERANCE = 1e-4  # largest difference of a vector's component

Sample = dict[str, Any]  # text, image, or both in any order
Call = tuple[list[Sample], str | None]  # and the instruction
Vectors = NDArray[np.float32]


class Compared(NamedTuple):
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
    """Texts and pictures of several lengths and shapes, in both orders and placed; the last one is
    cut to `max_length`.
    """
    random = np.random.default_rng(0)
    wide, tall, tiny = (
        Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
        for height, width in ((90, 140), (230, 61), (9, 9))
    )
    return [
        {"text": "a seven at the top left"},
        {"text": "Eine ältere Frau — 好 👋 liest"},
        {"text": "  blanks at both ends, and <image> in HTML \n"},
        {"image": wide},
        {"image": tiny},
        {"text": "what is in this picture?", "image": tall},
        {"image": wide, "text": " Find the same scene in the evening"},
        {"text": "two of them", "image": [wide, tall]},
        {"text": "<|image_1|>\nis this darker than <|image_2|>?", "image": [tall, wide]},
        {"text": "a crop <image> of a picture <image>", "image": [tiny, wide]},
        {"text": "again and again " * max_length},
    ]


def compare(trained: Embedder, folder: Path, *, with_sentence_transformers: bool) -> list[Compared]:
    """The trained model against its exported folder, read by each tool: all `samples` as they are,
    and those that are not cut with an instruction.

    Args:
        trained: gives the vectors that the others must give; as `export` hands it back, its weights
            rounded to the type that is exported. It computes in float32 on the CPU afterwards.
    """
    *short, long = samples(trained.processor.max_length)
    calls: list[Call] = [(short, None), ([long], None), (short, "Find it:")]
    expected = _by_embedder(trained, calls)
    ways: dict[str, Callable[[], list[Vectors]]] = {
        "Embedder": lambda: _by_embedder(Embedder.load(str(folder), device="cpu"), calls),
        "transformers": lambda: _by_transformers(folder, calls),
    }
    missing = with_sentence_transformers and not _installed("sentence_transformers")
    if with_sentence_transformers and not missing:
        ways["sentence-transformers"] = lambda: _by_sentence_transformers(folder, calls)
    found = []
    for way, vectors in ways.items():
        apart = [np.abs(v - e).max() for v, e in zip(vectors(), expected, strict=True)]
        is_stock = way != "Embedder" and not _installed("torchvision")
        note = "without torchvision, inside images_only()" if is_stock else ""
        found.append(Compared(way, float(np.max(apart)), note))
        gc.collect()  # one model in memory at a time, beside the trained one
    if missing:
        why = "not installed: pip install 'cocoa_pl[sentence-transformers]'"
        found.append(Compared("sentence-transformers", None, why))
    return found


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


# ---- as the model card shows it ----


def _by_embedder(embedder: Embedder, calls: Sequence[Call]) -> list[Vectors]:
    embedder.backbone.to("cpu")
    embedder.backbone.stock.to(torch.float32)
    embedder.backbone.compute_dtype = torch.float32
    return [embedder.encode(cases, instruction=instruction) for cases, instruction in calls]


def _by_transformers(folder: Path, calls: Sequence[Call]) -> list[Vectors]:
    """Stock classes, all cases of a call in one padded batch."""
    with images_only():
        processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for cases, instruction in calls:
        system = [{"role": "system", "content": instruction}] if instruction else []
        inputs = processor.apply_chat_template(
            [[*system, {"role": "user", "content": _content(case)}] for case in cases],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"text_kwargs": {"padding": True, "truncation": True}},
        )
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(dim=1) - 1
        found.append(normalize(states[torch.arange(len(last)), last], dim=-1).numpy())
    return found


def _by_sentence_transformers(folder: Path, calls: Sequence[Call]) -> list[Vectors]:
    from sentence_transformers import SentenceTransformer

    with images_only():
        model = SentenceTransformer(
            str(folder), device="cpu", model_kwargs={"dtype": torch.float32}
        )
    return [
        model.encode(cases, prompt=instruction, batch_size=len(cases), show_progress_bar=False)
        for cases, instruction in calls
    ]


def _content(case: Sample) -> list[Sample]:
    """A message's parts, in the sample's order."""
    parts = ((kind, part if isinstance(part, list) else [part]) for kind, part in case.items())
    return [{"type": kind, kind: one} for kind, several in parts for one in several]


@contextmanager
def images_only() -> Iterator[None]:
    """Within it, `AutoProcessor` and `SentenceTransformer` open folders of these families without
    torchvision, which upstream's processors need for videos alone.

    What they open stays usable after, and reads no videos. Where torchvision is installed nothing
    is changed.
    """
    with ExitStack() as patches:
        for model_type in () if _installed("torchvision") else FAMILIES:
            if name := PROCESSOR_MAPPING_NAMES.get(model_type):
                module = importlib.import_module(f"transformers.models.{model_type}")
                without = _without_videos(getattr(module, name))
                patches.enter_context(patch.object(module, name, without))
        yield


def _without_videos(hf_processor: Any) -> Any:
    """The same processor, which consists of one part less."""
    parts = [part for part in hf_processor.get_attributes() if part != "video_processor"]
    own = {"get_attributes": classmethod(lambda _: parts), "__module__": hf_processor.__module__}
    return type(hf_processor.__name__, (hf_processor,), own)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
