"""Texts and images in, unit vectors out: the library's front door."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Encoded, pack
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.fingerprint import check_fingerprint
from cocoa_pl.items import IMAGE_SLOT, ImageSource, Item
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import ADAPTER_CONFIG, find_folder, load

FORMAT = 1  # of cocoa.json
NEEDED = (
    "policy",
    "eos_token_id",
    "max_length",
    "min_pixels",
    "max_pixels",
    "dtype",
    "fingerprint",
)

Input = str | Item | Mapping[str, Any]


class Embedder:
    """A backbone with everything that its vectors depend on.

    Vectors do not depend on what else is encoded in the same call.
    """

    def __init__(self, backbone: Backbone, processor: Processor, policy: Policy) -> None:
        self.backbone = backbone
        self.processor = processor
        self.policy = policy

    @classmethod
    def load(cls, path: str, *, device: str = "auto") -> Embedder:
        """Open an exported folder, a run folder or a hub id, and check its fingerprint.

        Raises:
            UserError: if there is no such model, or if it does not give the vectors it was exported
                with.
        """
        folder = _export_folder(path)
        described = _read_description(folder / "cocoa.json")
        dtype = described["dtype"]
        loaded = load(folder, kernel="sdpa", dtype=dtype, gradient_checkpointing=False)
        processor = Processor(
            loaded.tokenizer,
            loaded.image_processor,
            max_length=described["max_length"],
            min_pixels=described["min_pixels"],
            max_pixels=described["max_pixels"],
            num_token_rows=loaded.backbone.num_token_rows,
        )
        if processor.eos_id != described["eos_token_id"]:
            raise UserError(
                f"{folder}: the tokenizer's end token is {processor.eos_id}, "
                f"the model was trained on {described['eos_token_id']}"
            )
        embedder = cls(
            loaded.backbone.to(chosen_device(device)), processor, Policy(**described["policy"])
        )
        expected = np.array(described["fingerprint"], dtype=np.float32)
        check_fingerprint(embedder.encode, expected, dtype=dtype, where=str(folder))
        return embedder

    @property
    def dim(self) -> int:
        return self.backbone.hidden_size

    @torch.inference_mode()
    def encode(self, items: Sequence[Input], *, batch_tokens: int = 8192) -> NDArray[np.float32]:
        """Embed items.

        Args:
            items: strings, `Item`s, or dicts with `text` and/or `image` (a path, bytes, a PIL
                image, or a list of them); images go before the text unless the text places them
                with U+FFFC.
            batch_tokens: tokens that go through the model together.

        Returns:
            (N, D) float32, rows of unit length, in the order given.

        Raises:
            UserError: naming the item that cannot be embedded.
        """
        if isinstance(items, str | Item | Mapping):
            raise UserError("encode takes a list of items; put a single one into a list")
        training = self.backbone.training
        self.backbone.eval()
        try:
            vectors = [self._embed(samples) for samples in self._batches(items, batch_tokens)]
        finally:
            self.backbone.train(training)
        return np.concatenate([np.zeros((0, self.dim), np.float32), *vectors])

    def _batches(self, items: Sequence[Input], batch_tokens: int) -> Iterator[list[Encoded]]:
        waiting: list[Encoded] = []
        used = 0
        for number, value in enumerate(items):
            sample = self._encoded(value, where=f"item {number}")
            if waiting and used + len(sample.input_ids) > batch_tokens:
                yield waiting
                waiting, used = [], 0
            waiting.append(sample)
            used += len(sample.input_ids)
        if waiting:
            yield waiting

    def _encoded(self, value: Input, *, where: str) -> Encoded:
        try:
            item = as_item(value)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        return self.processor.encode(item, None, key=0, seed=0, row_id=where)

    def _embed(self, samples: list[Encoded]) -> NDArray[np.float32]:
        batch, device = pack(samples), self.backbone.device
        layout = self.backbone.layouts(self.policy)(batch)
        embeddings = self.backbone.embed(batch.to(device), layout.to(device))
        vectors: NDArray[np.float32] = embeddings.cpu().numpy()
        return vectors


def chosen_device(device: str) -> str:
    """`auto` is the GPU if there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_item(value: Input) -> Item:
    """What users pass to an `Item`.

    Raises:
        ValueError: for an empty or unknown input.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"an item is a string, an Item or a dict, not {type(value).__name__}")
    if unknown := set(value) - {"text", "image"}:
        raise ValueError(f"an item has the keys text and image, not {sorted(unknown)}")
    text, image = value.get("text") or "", value.get("image")
    if not isinstance(text, str):
        raise ValueError(f"an item's text is a string, not {type(text).__name__}")
    sources: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    images: tuple[ImageSource, ...] = tuple(
        Path(s) if isinstance(s, str) else s for s in sources if s is not None
    )
    if not text and not images:
        raise ValueError("an item needs a text or an image")
    if not all(isinstance(s, Path | bytes | Image) for s in images):
        raise ValueError("an image is a path, bytes or a PIL image")
    missing = len(images) - text.count(IMAGE_SLOT)
    return Item(IMAGE_SLOT * max(missing, 0) + text, images)


def _export_folder(path: str) -> Path:
    """The exported folder that a run folder holds, or that the path is itself."""
    inner = Path(path) / "model"
    folder = find_folder(str(inner if (inner / "cocoa.json").is_file() else path))
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} is an adapter, which says nothing of attention and pooling; make a model of "
            f"it first: train.py init_from={folder} stage=... exports one"
        )
    if not (folder / "cocoa.json").is_file():
        raise UserError(f"{folder} holds no cocoa.json: it was not exported by cocoa_pl")
    return folder


def _read_description(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(described, dict) or "format" not in described:
        raise UserError(f"{path} does not describe a model exported by cocoa_pl")
    if described["format"] != FORMAT:
        raise UserError(f"{path}: format {described['format']} is not {FORMAT}; update cocoa_pl")
    if missing := [name for name in NEEDED if name not in described]:
        raise UserError(f"{path} lacks {', '.join(missing)}; export the model again")
    return described
