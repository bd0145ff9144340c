"""Map chunks of work in their order over a bounded number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from cocoa_pl.data.item_batches import map_ahead
from cocoa_pl.distributed.processes import end_with_parent
from cocoa_pl.errors import UserError

_Chunk = TypeVar("_Chunk")
_Result = TypeVar("_Result")

AHEAD = 3  # chunks of each process that are computed or wait to be taken: a bound on memory

_work: Callable[[Any], Any]  # of a worker process, set once when it starts


def ordered_map(
    work: Callable[[_Chunk], _Result], chunks: Iterable[_Chunk], *, workers: int
) -> Iterator[_Result]:
    """`map(work, chunks)` in `workers` processes; 0 computes here.

    `work` is sent to each process once, a chunk when there is room for it.

    Raises:
        UserError: when a process dies, which is what happens when memory runs out.
    """
    if not workers:
        yield from map(work, chunks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(work,))
    try:
        yield from map_ahead(pool, _do, chunks, ahead=AHEAD * workers)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely because memory ran out; "
            f"use fewer than workers={workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    end_with_parent()


def _do(chunk: Any) -> Any:
    return _work(chunk)
