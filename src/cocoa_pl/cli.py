"""The `cocoa` command: runs the sub-command that its first word names.

A sub-command is imported only when it runs: torch and transformers take seconds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        module: offers `run(arguments: Sequence[str], console: Console) -> int`, the exit status.
        summary: one line in the list of commands.
        about: what `--help` says of a command whose arguments are `key=value`, as of `train.py`;
            None for one that parses its own arguments.
    """

    module: str
    summary: str
    about: str | None


COMMANDS = {
    "attention": Command(
        module="cocoa_pl.attention.command",
        summary="print an attention policy as a 0/1 grid and write it as a PNG",
        about=None,
    ),
    "doctor": Command(
        module="cocoa_pl.doctor.command",
        summary="check a data set and its images before training",
        about="""\
Check every row and every image that training would read, and report all that is wrong with them.
Keys and values are those of train.py; the doctor's own are out and workers.

  cocoa doctor
  cocoa doctor data=mmeb data.root=MMEB-train model=qwen2vl model.source.path=Qwen2-VL-2B-Instruct
  cocoa doctor data=pairs data.path=my.jsonl data.image_root=images workers=8

Exit status: 0 healthy, 1 if something would stop training, 2 for a mistake in the command.""",
    ),
    "export": Command(
        module="cocoa_pl.export.command",
        summary="a trained model for Hugging Face or sentence-transformers, checked",
        about=None,
    ),
    "mine": Command(
        module="cocoa_pl.mining.command",
        summary="training data with hard negatives that a model finds",
        about=None,
    ),
    "report": Command(
        module="cocoa_pl.evaluation.comparison",
        summary="scored runs side by side on one page",
        about=None,
    ),
    "search": Command(
        module="cocoa_pl.search.command",
        summary="search a folder of images by a text, an image, or both",
        about=None,
    ),
    "plan": Command(
        module="cocoa_pl.planning.command",
        summary="what a training run needs: memory, time, disk",
        about="""\
Work out what a training run needs before it is paid for: parameters, memory per GPU, FLOPs,
hours, disk. Keys and values are those of train.py.

  cocoa plan experiment=paper_qwen2vl_2b data.root=MMEB-train gpus=8""",
    ),
}


def main() -> None:
    """Entry point of the `cocoa` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line without its first word, `cocoa`; a user's mistake is one sentence.

    Returns:
        The sub-command's exit status, 2 for a user's mistake, 130 when interrupted.
    """
    parsed = _parser().parse_args(arguments)
    command, rest = COMMANDS[parsed.command], list(parsed.arguments)
    if command.about is not None:
        rest = _overrides(parsed.command, command.about, rest)
    # Not at the top of the file: `cocoa --help` should not wait for them.
    from cocoa_pl.config.process import guarded
    from cocoa_pl.errors import UserError

    statuses: list[int] = []

    def body() -> None:
        module = importlib.import_module(command.module)
        try:
            statuses.append(module.run(rest, Console()))
        except OSError as error:
            if error.filename is None:
                raise
            # A folder where a file shall be written, a file where a folder, a full disk.
            raise UserError(f"{error.filename}: {error.strerror}") from error

    return guarded(body) or statuses[0]


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="cocoa",
        usage="cocoa COMMAND ...",
        description="Small tools around training, which is `python train.py` in the repository.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {c.summary}" for name, c in COMMANDS.items())
        + "\n\n`cocoa COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _overrides(name: str, about: str, arguments: Sequence[str]) -> list[str]:
    """The `key=value` words; `--help` prints what the command is about and exits."""
    parser = argparse.ArgumentParser(
        prog=f"cocoa {name}",
        usage=f"cocoa {name} [KEY=VALUE ...]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    return list(parser.parse_args(arguments).overrides)
