"""How the processes of a job begin, are asked to stop, and end with each other."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cocoa_pl.errors import Interrupted

LOST_PROCESS, INTERRUPTED = 3, 130  # exit statuses
CHECK_SECONDS = 1.0
# torchrun and srun hand on a signal that the terminal or SLURM has delivered already.
ECHO_SECONDS = 1.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, and what clusters send


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this a signal that asks the process to stop raises `Interrupted`; a second one, which
    is no echo of it, ends it at once.

    Lightning leaves a SIGUSR1 alone that has a handler. Within SLURM it would answer with a
    checkpoint of its own, which it loads into every later stage, and requeue the job.
    """
    process, before, said, since = os.getpid(), stop_handlers(), "", 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal said, since
        if os.getpid() != process:  # a forked worker, which its pool ends
            signal.signal(number, before[number])
            signal.raise_signal(number)
        elif not said:
            said, since = f"interrupted by {signal.Signals(number).name}", time.monotonic()
            raise Interrupted(said)
        elif time.monotonic() - since > ECHO_SECONDS:
            os._exit(INTERRUPTED)

    handle_stops(dict.fromkeys(before, stop))
    try:
        yield
    finally:
        handle_stops(before)
        if said:  # whatever was left half done complains of
            raise Interrupted(said)


def stop_handlers() -> dict[int, Any]:
    """Handlers of the signals that ask a process to stop, without those that are ignored, as Ctrl-C
    by a shell's background job.
    """
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    return {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}


def handle_stops(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end_with_parent(*, message: str = "") -> None:
    """End this process when the one that started it is gone, even by SIGKILL.

    Data workers of a killed process would wait for good: each is blocked on a pipe that is full and
    that its siblings hold open. torch's own watchdog looks while they wait for work alone.

    Args:
        message: for stderr, when it comes to that.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(CHECK_SECONDS)
        sys.stderr.write(message)
        os._exit(LOST_PROCESS)  # not sys.exit, which ends this thread alone

    threading.Thread(target=watch, daemon=True).start()


def is_lost_worker(error: RuntimeError) -> bool:
    """Whether a data worker ended without an error of its own, as where memory runs out."""
    text = str(error)
    ended = "is killed by signal" in text or "exited unexpectedly" in text
    return text.startswith("DataLoader worker (pid") and ended
