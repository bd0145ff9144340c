"""What worker processes measure: every distinct image, decoded once by the code that training uses,
and the tokens of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from cocoa_pl.data.datamodule import start_worker
from cocoa_pl.data.examples import MakeSamples
from cocoa_pl.data.images import ImageSource, open_image
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import mix
from cocoa_pl.distributed.processes import is_lost_worker
from cocoa_pl.errors import UserError
from cocoa_pl.stages.recipe import Stage

_CHUNK = 64  # images or rows: a second or less of work
_FIRST_EPOCH = 0

Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]  # values, label, how many -> values


def in_workers(
    work: Callable[[Any], Iterable[Any]], values: Sequence[Any], *, workers: int
) -> Iterator[Any]:
    """What `work` makes of some values at a time, one after the other in their order.

    Args:
        workers: processes; 0 computes here.

    Raises:
        UserError: when a process dies, which is what happens when memory runs out.
    """
    data: Any = values  # what has a length and places is a data set
    try:
        for results in DataLoader(
            data, _CHUNK, collate_fn=work, num_workers=workers, worker_init_fn=start_worker
        ):
            yield from results
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        raise UserError(
            "a worker process was killed, most likely because memory ran out; "
            f"use fewer than workers={workers}"
        ) from error


class Opened(NamedTuple):
    """What is known of an image.

    Attributes:
        size: width and height.
        content: names the file's bytes; of an image that cannot be read, the file.
        error: why it cannot be read.
    """

    size: tuple[int, int]
    content: int
    error: UserError | None


class Images:
    """All distinct images of these items.

    Args:
        watch: passes values on and shows how many there were.
    """

    def __init__(self, items: Iterable[Item], *, workers: int, watch: Watch) -> None:
        distinct = {_key(image): image for item in items for image in item.media}
        opened = in_workers(_open, list(distinct.values()), workers=workers)
        shown = watch(opened, "images", len(distinct))
        self._opened: dict[int, Opened] = dict(zip(distinct, shown, strict=True))

    def __getitem__(self, image: ImageSource) -> Opened:
        return self._opened[_key(image)]

    def __len__(self) -> int:
        return len(self._opened)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N, 2] width and height of each image that can be read."""
        sizes = [image.size for image in self._opened.values() if not image.error]
        return np.array(sizes, np.int64).reshape(-1, 2)

    def content_of(self, item: Item) -> int:
        """A hash of text and image contents, whatever the files are called."""
        return hash((item.text, *(self[image].content for image in item.media)))


def file_name(image: ImageSource) -> str:
    """The path of an image, or nothing for one that is not a file."""
    return str(image) if isinstance(image, Path) else ""


def _key(image: ImageSource) -> int:
    """63 bits that name a path, encoded bytes or a picture."""
    return Item(IMAGE_SLOT, (image,)).key


def _open(images: Sequence[ImageSource]) -> list[Opened]:
    opened = []
    for image in images:
        try:
            size = open_image(image).size
            # Its bytes come from the page cache: it was just decoded.
            content = _key(image.read_bytes() if isinstance(image, Path) else image)
            opened.append(Opened(size, content, None))
        except UserError as error:
            opened.append(Opened((0, 0), _key(image), error))
    return opened


def count_tokens(
    rows: Sequence[Pair],
    make_samples: MakeSamples,
    processor: Processor,
    images: Images,
    seed: int,
    numbers: Sequence[int],
) -> list[tuple[str, list[int | None]]]:
    """Of the rows of these numbers the names, and tokens of the samples that a stage makes of them
    in its first epoch, with EOS and before anything is cut; None for one that cannot be made.

    No image is opened again: its visual tokens follow from its size.
    """

    def total(context: Item, target: str | None) -> int | None:
        opened = [images[image] for image in context.media]
        if any(image.error for image in opened):
            return None
        visual_tokens = [processor.count_visual_tokens(*image.size) for image in opened]
        try:
            room = processor.room_for_text(visual_tokens)
        except UserError:
            return None
        texts = [*context.text.split(IMAGE_SLOT), target or ""]
        num_text = sum(processor.count_text_tokens(text) for text in texts if text)
        return num_text + processor.max_length - room

    counted = []
    for number in numbers:
        pair, rng = rows[number], np.random.default_rng(mix(seed, _FIRST_EPOCH, number))
        counted.append((pair.row_id, [total(*sample) for sample in make_samples(pair, rng)]))
    return counted


def length_facts(
    stage: Stage, num_rows: int, totals: Sequence[int], num_unknown: int, max_length: int
) -> dict[str, Any]:
    """Token lengths of a stage's samples, and of its steps over all ranks.

    Args:
        totals: tokens of each sample with EOS, before anything is cut.
        num_unknown: samples that cannot be made.
    """
    lengths = np.array(totals, np.int64)
    given = np.minimum(lengths, max_length)
    per_row = given.mean() * (len(given) + num_unknown) / num_rows if len(given) else 0.0
    tokens, budget = float(per_row * stage.batch_size), stage.token_budget
    return {
        "stage": stage.name,
        "rows": num_rows,
        "samples": len(lengths),
        "unknown": num_unknown,
        "max_length": max_length,
        "cut": int((lengths > max_length).sum()),
        "tokens": spread(lengths) if len(lengths) else None,
        "tokens_per_step": tokens,
        "token_budget": budget,
        "passes": tokens / budget,
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Least, percentiles and greatest of a non-empty array."""
    of = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: float(np.percentile(values, percent)) for name, percent in of.items()}
