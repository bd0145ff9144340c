"""Samples for one model call at a time: items of similar cost together, read ahead of the model.

Images are decoded and texts tokenized by a few threads. What exists at once is a window of costs
and a few batches, however many items there are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.data.batch import VISUAL_TOKEN_COST, Sample, cut_by_cost
from cocoa_pl.data.images import image_size
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.errors import UserError

WINDOW = 4096  # items that are sorted together

_READY = 2  # batches that wait for the model beside those that threads work on

_Laid = TypeVar("_Laid")
_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


def item_batches(
    count: int,
    item_at: Callable[[int], Item],
    processor: Processor,
    lay_out: Callable[[list[Sample]], _Laid],
    *,
    batch_tokens: int,
    threads: int,
) -> Generator[tuple[NDArray[np.intp], _Laid]]:
    """Numbers of items, and what `lay_out` makes of their samples, batch after batch.

    The dearest items of a window go first: what does not fit into memory is known at once, and so
    is what cannot be read.

    Args:
        item_at: the item of a number from 0 to `count`; may be called twice, from any thread.
        lay_out: is called in the threads too.
        batch_tokens: of a batch at most; a longer single item is a batch alone.
        threads: that read ahead; 0 does so when a batch is asked for.

    Raises:
        UserError: what `item_at` or the processor says of the first bad item in the order of the
            batches, which depends on the items alone; with its number.
    """
    batch_tokens = whole_number("batch_tokens", batch_tokens, least=1)
    threads = whole_number("threads", threads, least=0)

    def read(numbers: NDArray[np.intp]) -> tuple[NDArray[np.intp], _Laid]:
        samples = []
        for number in numbers.tolist():
            try:
                item = item_at(number)
                samples.append(processor(item, None, key=0, row_id=f"item {number}"))
            except UserError as error:
                error.item = number
                raise
        return numbers, lay_out(samples)

    with some_threads(threads) as pool:
        # A window ahead, so that the model never waits for the measures of the next one.
        measure = partial(_measure, item_at, processor)
        measured = map_ahead(pool, measure, range(count), ahead=WINDOW)
        windows = _cut_windows(measured, batch_tokens)
        yield from map_ahead(pool, read, windows, ahead=threads + _READY)


def whole_number(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """A whole number within bounds, also of numpy.

    Raises:
        UserError: for what is none, as a bool, a text or 8.0.
    """
    is_one = isinstance(value, Integral) and not isinstance(value, bool)
    if is_one and least <= (number := int(value)) and (most is None or number <= most):
        return number
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise UserError(f"{name} is a whole number {bounds}, not {value!r}")


def _cut_windows(
    measured: Iterator[tuple[int, float]], batch_tokens: int
) -> Iterator[NDArray[np.intp]]:
    start = 0
    while window := list(islice(measured, WINDOW)):
        tokens, costs = zip(*window, strict=True)
        for places in cut_by_cost(np.array(tokens), np.array(costs, np.float64), batch_tokens):
            yield start + places
        start += len(window)


def _measure(
    item_at: Callable[[int], Item], processor: Processor, number: int
) -> tuple[int, float]:
    """Tokens of an item and what they cost, from the text and the images' headers; infinite for one
    that cannot be embedded: reading it will say what is wrong with it.
    """
    try:
        item = item_at(number)
        visual = [processor.count_visual_tokens(*image_size(image)) for image in item.media]
        room = processor.room_for_text(visual)
    except UserError:
        return 0, math.inf
    text = sum(processor.count_text_tokens(part) for part in item.text.split(IMAGE_SLOT) if part)
    tokens = processor.max_length - room + min(text, room)
    return tokens, tokens + VISUAL_TOKEN_COST * sum(visual)


@contextmanager
def some_threads(count: int) -> Iterator[Executor | None]:
    """A pool of threads; they end when the block is left, however it is left. None for 0."""
    if not count:
        yield None
        return
    pool = ThreadPoolExecutor(count, "item_batches")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def map_ahead(
    pool: Executor | None,
    work: Callable[[_Value], _Result],
    values: Iterable[_Value],
    *,
    ahead: int,
) -> Iterator[_Result]:
    """`map(work, values)` in a pool; `ahead` results at most are computed or wait to be taken.

    An error is raised where its result would have been, so the first value that fails decides,
    whichever thread was faster. Several maps may share a pool. Without one nothing is computed
    before it is needed.
    """
    if pool is None:
        yield from map(work, values)
        return
    waiting: deque[Future[_Result]] = deque()
    for value in values:
        waiting.append(pool.submit(work, value))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
