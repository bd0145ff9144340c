"""`Embedder`, the library's front door: unit vectors of texts and images."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.data.batch import Batch, Sample, pack
from cocoa_pl.data.item_batches import item_batches, whole_number
from cocoa_pl.data.items import Input, as_item, as_list
from cocoa_pl.data.processor import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.losses import matryoshka
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.exported import (
    check_fingerprint,
    digest_of,
    digest_of_text,
    export_folder,
    read_description,
)
from cocoa_pl.models.loading import load

log = logging.getLogger(__name__)

EVERY_SECONDS = 30.0  # between two lines in the log; short work logs nothing
THREADS = 4  # that read images and tokenize ahead of the model

# A model that runs twice at once is no faster, and needs the memory of both.
_one_at_a_time = threading.Lock()

Part = tuple[NDArray[np.intp], NDArray[np.float32]]  # places of items, and their vectors
Queued = tuple[NDArray[np.intp], Tensor, torch.cuda.Event | None]  # on the device


class Embedder:
    """A backbone with everything that its vectors depend on.

    Vectors do not depend on what else is encoded in the same call.
    """

    def __init__(self, backbone: Backbone, processor: Processor, policy: Policy) -> None:
        self.backbone = backbone
        self.processor = processor
        self.policy = policy

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "auto") -> Embedder:
        """Open an exported folder, a run folder or a hub id; its files and vectors must be those
        that were exported.

        Raises:
            UserError: if there is no such model, a file of it was changed, or it does not give the
                vectors it was exported with.
        """
        device = chosen_device(device)
        folder = export_folder(os.fspath(path))
        described = read_description(folder)
        dtype = described["dtype"]
        loaded = load(folder, kernel="auto", dtype=dtype, gradient_checkpointing=False)
        processor = Processor(
            loaded.tokenizer,
            loaded.image_processor,
            max_length=described["max_length"],
            min_pixels=described["min_pixels"],
            max_pixels=described["max_pixels"],
            num_token_rows=loaded.num_token_rows,
        )
        backbone = loaded.backbone.to(device).eval()
        embedder = cls(backbone, processor, Policy.from_dict(described["policy"]))
        expected = np.array(described["fingerprint"], dtype=np.float32)
        check_fingerprint(embedder.encode, expected, dtype=dtype, where=str(folder))
        return embedder

    @property
    def dim(self) -> int:
        return self.backbone.hidden_size

    def identity(self) -> dict[str, Any]:
        """What vectors depend on, for telling whether kept ones are this model's: digests and
        settings.
        """
        processor = self.processor
        return {
            "weights": digest_of(self.backbone.state_dict()),
            "tokenizer": digest_of_text(processor.tokenizer.backend_tokenizer.to_str()),
            "image_processor": digest_of_text(processor.image_processor.to_json_string()),
            "policy": self.policy.to_dict(),
            "eos_token_id": processor.eos_id,
            "max_length": processor.max_length,
            "min_pixels": processor.min_pixels,
            "max_pixels": processor.max_pixels,
            "dtype": str(self.backbone.compute_dtype).removeprefix("torch."),
        }

    def encode(
        self,
        items: Iterable[Input],
        *,
        instruction: str | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int = 8192,
        threads: int = THREADS,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed items.

        Args:
            items: strings, which are texts; images (a `Path`, bytes, a PIL image, or a uint8 array
                of height x width x 3); dicts with `text` and/or `image` (also a path as a string,
                or a list of images); or `Item`s. Images go on a line before the text unless it
                places them, with `<|image_1|>`, `<|image_2|>`, ... or with an `<image>` for each.
                A list, or what has an order: a pandas Series counts by place, not by label.
            instruction: what all of them are embedded for, before each one's own words; queries of
                MMEB have one, candidates often none. None or empty for none.
            truncate_dim: leading components to keep, for a model trained with `matryoshka_dims`;
                vectors are of unit length afterwards. None for all.
            batch_tokens: tokens that go through the model together, at most (a longer single item
                goes alone).
            threads: that read images and tokenize texts ahead of the model, and ask a sequence of
                your own for its items; 0 for none.
            progress: show a bar on stderr.

        Returns:
            (N, D) float32, rows of unit length, in the order given.

        Raises:
            UserError: naming the item that cannot be embedded, or a `truncate_dim` that is none.
        """
        items = as_list(items)
        dim = self.dim
        if truncate_dim is not None:
            dim = whole_number("truncate_dim", truncate_dim, least=1, most=self.dim)
        stream = self.stream(
            items, instruction=instruction, batch_tokens=batch_tokens, threads=threads
        )
        vectors = np.empty((len(items), dim), np.float32)
        bar = Progress(console=Console(stderr=True), disable=not progress)
        task = bar.add_task("", total=len(items))
        with closing(stream), bar:
            for numbers, some in stream:
                if dim < self.dim:
                    some = matryoshka(torch.from_numpy(some), [dim])[0].numpy()
                vectors[numbers] = some
                bar.advance(task, len(numbers))
        return vectors

    def stream(
        self,
        items: Iterable[Input],
        *,
        instruction: str | None = None,
        batch_tokens: int = 8192,
        threads: int = THREADS,
    ) -> Generator[Part]:
        """Embed items and hand over each batch when it is there, for more items than memory holds.

        Arguments and errors are those of `encode`. Several threads may embed at once: a model runs
        for one of them at a time.

        Returns:
            An iterator over places in `items`, (n), and their vectors, (n, D). Each item occurs
            once; the order is by cost within a few thousand items.
        """
        items = as_list(items)
        as_item("words", instruction)  # a wrong instruction is no item's mistake
        batches = item_batches(
            len(items),
            lambda number: as_item(items[number], instruction),
            self.processor,
            self._pack,
            batch_tokens=batch_tokens,
            threads=threads,
        )
        queued: deque[Queued] = deque()
        count, started = 0, time.monotonic()
        said = started

        def fetched() -> Part:
            nonlocal count, said
            numbers, vectors, copied = queued.popleft()
            if copied is not None:
                copied.synchronize()
            count += len(numbers)
            now = time.monotonic()
            if now - said >= EVERY_SECONDS:
                said = now
                left = timedelta(seconds=round((now - started) * (len(items) / count - 1)))
                log.info("embedded %s of %s items, %s to go", f"{count:,}", f"{len(items):,}", left)
            return numbers, vectors.numpy()

        with closing(batches):
            for numbers, batch in batches:
                queued.append((numbers, *self._embed(batch)))
                # A GPU has the next one while this one is fetched; on a CPU it is there, and what
                # ends the work must not cost it.
                if len(queued) > 1 or queued[0][2] is None:
                    yield fetched()
            while queued:
                yield fetched()

    def _pack(self, samples: list[Sample]) -> Batch:
        """The model's input; in a thread ahead of it, and for a GPU in pinned memory."""
        device = self.backbone.device
        batch = pack(samples, self.backbone.planner(self.policy))
        if device.type != "cuda":
            return batch
        with torch.cuda.device(device):  # a new thread begins with the first GPU
            return batch.pin_memory()

    def _embed(self, batch: Batch) -> tuple[Tensor, torch.cuda.Event | None]:
        """Queue a batch on the device; its vectors are on the host once the event has come."""
        with _one_at_a_time, torch.inference_mode(), _evaluating(self.backbone):
            vectors = self.backbone.embed(batch.to(self.backbone.device))
            on_host = vectors.to("cpu", non_blocking=True)
            if not vectors.is_cuda:
                return on_host, None
            return on_host, torch.cuda.current_stream(vectors.device).record_event()


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    """Every module in evaluation mode, and those that were in training mode in it again after."""
    trained = [module for module in backbone.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def chosen_device(device: str) -> str:
    """`auto` is the GPU if there is one, else the CPU.

    Raises:
        UserError: for a device that is not here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu"]
    if found is not None:
        numbers = range(torch.accelerator.device_count())
        known += [found.type, *(f"{found.type}:{number}" for number in numbers)]
    if str(device) not in known:
        raise UserError(f"device={device} is not here; there are auto, {', '.join(known)}")
    return str(device)
