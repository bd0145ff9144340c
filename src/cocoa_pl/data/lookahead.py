"""Work on values in, its results in the same order out, computed by a few threads ahead of use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


class Lookahead(AbstractContextManager["Lookahead"]):
    """A few threads; they end when the block is left, however it is left.

    Args:
        threads: how many; 0 computes where a result is asked for, and nothing ahead of it.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> Lookahead:
        self._pool = ThreadPoolExecutor(self.threads, "lookahead") if self.threads else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(
        self, work: Callable[[_Value], _Result], values: Iterable[_Value], *, ahead: int
    ) -> Iterator[_Result]:
        """`map(work, values)`; `ahead` results at most are computed or wait to be taken.

        An error is raised where its result would have been, so the first value that fails is the
        one that is told, whichever thread was faster. Several maps may share the threads.
        """
        if self._pool is None:
            yield from map(work, values)
            return
        waiting: deque[Future[_Result]] = deque()
        for value in values:
            waiting.append(self._pool.submit(work, value))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
