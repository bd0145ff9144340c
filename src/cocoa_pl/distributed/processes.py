"""Processes of one job that end with each other."""

import os
import sys
import threading
import time

LOST_PROCESS = 3  # exit status
CHECK_SECONDS = 1.0


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
