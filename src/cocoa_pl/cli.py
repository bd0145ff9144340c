"""The `cocoa` command: runs the sub-command that its first word names.

A sub-command is imported only when it runs: torch and transformers take seconds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from rich.console import Console

# A module of the package that offers `run(words: Sequence[str], console: Console) -> int`, the exit
# status, and one line in the list of commands.
COMMANDS = {
    "attention": ("attention.command", "an attention policy as a 0/1 grid and as a PNG"),
    "doctor": ("doctor.command", "check a data set and its images before training"),
    "export": ("export.command", "a trained model for transformers or sentence-transformers"),
    "mine": ("mining", "training data with hard negatives that a model finds"),
    "report": ("evaluation.compare", "scored runs side by side on one page"),
    "search": ("search.command", "search a folder of images by a text, an image, or both"),
    "plan": ("planning.command", "what a training run needs: memory, time, disk"),
}


def main() -> None:
    """Entry point of the `cocoa` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line without its first word, `cocoa`; a user's mistake is one sentence.

    Returns:
        The sub-command's exit status, 2 for a user's mistake, 130 when interrupted.
    """
    width = max(map(len, COMMANDS))
    summaries = (f"{name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="cocoa",
        description="Small tools around training, which is `python train.py` in the repository.",
        epilog="`cocoa COMMAND --help` says more.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="\n".join(summaries))
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    parsed = parser.parse_args(arguments)
    # Not at the top of the file: `cocoa --help` should not wait for it.
    from cocoa_pl.config.process import guarded

    module = f"{__package__}.{COMMANDS[parsed.command][0]}"
    return guarded(lambda: importlib.import_module(module).run(parsed.words, Console()))
