"""Compare the vectors that each tool reads from an exported folder with the trained model's.

Everything is computed in float32 on the CPU, so that what differs is not rounding: pixels, tokens,
positions, attention, pooling.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES

from cocoa_pl.data.images import open_image
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import FAMILIES

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


@dataclass(frozen=True)
class Call:
    """Samples of one call, as `Embedder.encode` takes them."""

    cases: Sequence[Sample]
    instruction: str | None = None
    truncate_dim: int | None = None


def samples(max_length: int) -> list[Sample]:
    """Texts and pictures of several lengths and shapes, in both orders and placed, odd ones among
    them; the last one is cut to `max_length`.
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
        *({"text": name, "image": picture} for name, picture in odd_pictures().items()),
        {"text": "again and again " * max_length},
    ]


def odd_pictures() -> dict[str, bytes]:
    """Encoded pictures that other tools read otherwise, unless `open_image` has read them."""
    ramp = np.linspace(0, 1, 60 * 90).reshape(60, 90)
    colours = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2)
    turned = Image.Exif()
    turned[Base.Orientation] = 6
    pictures: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
        "16-bit grey": ((ramp * 65535).astype(np.uint16), {}),
        "turned by EXIF": ((colours * 255).astype(np.uint8), {"exif": turned}),
        "transparent": ((np.dstack([colours, ramp]) * 255).astype(np.uint8), {}),
    }
    found = {}
    for name, (pixels, options) in pictures.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", **options)
        found[name] = buffer.getvalue()
    return found


def compare(
    trained: Embedder, folder: Path, *, with_sentence_transformers: bool
) -> tuple[Compared, ...]:
    """The trained model against its exported folder, read by each tool: all `samples` as they are,
    and those that are not cut with an instruction and with fewer components.

    Args:
        trained: gives the vectors that the others must give; as `export` hands it back, its weights
            rounded to the type that is exported. It computes in float32 on the CPU afterwards.
    """
    *short, long = samples(trained.processor.max_length)
    calls = (
        Call(short),
        Call([long]),
        Call(short, instruction="Find it:"),
        Call(short[:1], truncate_dim=(trained.dim + 1) // 2),
    )
    expected = by_embedder(_in_float32(trained), calls)
    ways: dict[str, Callable[[], list[Vectors]]] = {
        "Embedder": lambda: by_embedder(
            _in_float32(Embedder.load(str(folder), device="cpu")), calls
        ),
        "transformers": lambda: by_transformers(folder, calls),
    }
    note = "" if _installed("torchvision") else "without torchvision, inside images_only()"
    notes = {"transformers": note, "sentence-transformers": note}
    missing = with_sentence_transformers and not _installed("sentence_transformers")
    if with_sentence_transformers and not missing:
        ways["sentence-transformers"] = lambda: by_sentence_transformers(folder, calls)
    found = []
    for way, vectors in ways.items():
        apart = [np.abs(v - e).max() for v, e in zip(vectors(), expected, strict=True)]
        found.append(Compared(way, float(np.max(apart)), notes.get(way, "")))
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


def by_embedder(embedder: Embedder, calls: Sequence[Call]) -> list[Vectors]:
    """What the model card shows."""
    return [
        embedder.encode(call.cases, instruction=call.instruction, truncate_dim=call.truncate_dim)
        for call in calls
    ]


def by_transformers(folder: Path, calls: Sequence[Call]) -> list[Vectors]:
    """What the model card shows: stock classes, all cases of a call in one padded batch."""
    with images_only():
        processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for call in calls:
        system = [{"role": "system", "content": call.instruction}] if call.instruction else []
        conversations = [
            [*system, {"role": "user", "content": _content(case)}]
            for case in map(_read, call.cases)
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
        vectors = states[torch.arange(len(last)), last, : call.truncate_dim]
        found.append(normalize(vectors, dim=-1).numpy())
    return found


def by_sentence_transformers(folder: Path, calls: Sequence[Call]) -> list[Vectors]:
    """What the model card shows."""
    from sentence_transformers import SentenceTransformer

    with images_only():
        model = SentenceTransformer(
            str(folder), device="cpu", model_kwargs={"dtype": torch.float32}
        )
    return [
        model.encode(
            [_read(case) for case in call.cases],
            prompt=call.instruction,
            truncate_dim=call.truncate_dim,
            normalize_embeddings=True,
            batch_size=len(call.cases),
            show_progress_bar=False,
        )
        for call in calls
    ]


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
    """The same processor; what it consists of is read off the arguments of its constructor."""

    def construct(
        self: Any,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        hf_processor.__init__(
            self, image_processor, tokenizer, None, chat_template=chat_template, **kwargs
        )

    attributes = {"__init__": construct, "__module__": hf_processor.__module__}
    return type(hf_processor.__name__, (hf_processor,), attributes)


def _read(case: Sample) -> Sample:
    """The sample with its images read by this project, which other tools then read alike."""
    if "image" not in case:
        return case
    images = case["image"] if isinstance(case["image"], list) else [case["image"]]
    return {**case, "image": [open_image(image) for image in images]}


def _content(case: Sample) -> list[Sample]:
    """A message's parts, in the sample's order."""
    parts = ((kind, part if kind == "image" else [part]) for kind, part in case.items())
    return [{"type": kind, kind: one} for kind, several in parts for one in several]


def _in_float32(embedder: Embedder) -> Embedder:
    embedder.backbone.to("cpu")
    embedder.backbone.stock.to(torch.float32)
    embedder.backbone.compute_dtype = torch.float32
    return embedder


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
