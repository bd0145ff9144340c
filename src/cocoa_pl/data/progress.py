"""Finished items in, a line now and then in the log out: how far, how fast, how long to go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console

log = logging.getLogger(__name__)

EVERY_SECONDS = 30.0  # short work says nothing


class Progress:
    """Counts what is done of `total`.

    Args:
        done: what is said of an item, e.g. "embedded".
    """

    def __init__(self, total: int, *, done: str) -> None:
        self.total = total
        self.done = done
        self.count = 0
        self._started = self._said = time.monotonic()

    def advance(self, items: int) -> None:
        self.count += items
        now = time.monotonic()
        if now - self._said < EVERY_SECONDS:
            return
        self._said = now
        rate = self.count / (now - self._started)
        log.info(
            "%s %s of %s items, %.3g a second, about %s to go",
            self.done,
            f"{self.count:,}",
            f"{self.total:,}",
            rate,
            _duration((self.total - self.count) / rate),
        )


@contextmanager
def bar(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that whoever embeds may ask for; yields what advances it."""
    console = Console(stderr=True)
    columns = (
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, disable=not shown) as found:
        task = found.add_task("", total=total)
        yield lambda items: found.advance(task, items)


def _duration(seconds: float) -> str:
    """E.g. `40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
