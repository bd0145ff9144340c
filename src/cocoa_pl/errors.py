"""What ends a command without a traceback: a mistake of the user, and a signal."""

from __future__ import annotations

import difflib
import importlib
import re
import shlex
from collections.abc import Iterable
from os import PathLike
from typing import Any


class UserError(ValueError):
    """A mistake in the user's data, config or files, as one sentence that names the culprit.

    Entry points print it without a traceback and exit with status 2; all else is a bug of ours.
    The fields may be filled in by who knows them, on the error's way up. Copies and pickles keep
    them; of an error that a data worker raised torch hands over the sentence alone.

    Args:
        message: what is wrong and what to do; the row, or else the item, and the role come first.
        kind: which mistake it is, for those that `cocoa doctor` counts.
        row_id: the row's name, such as `Set row 812`.
        role: the side of the row, such as `query`.
        file: the file that is meant.
        item: the place in the list of a caller who has no names.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str = "",
        row_id: str = "",
        role: str = "",
        file: str | PathLike[str] = "",
        item: int | None = None,
    ) -> None:
        # A DataLoader worker hands its whole traceback over as the message of a new UserError.
        self.message = message.rsplit(f"{__name__}.UserError: ", 1)[-1].rstrip("\n")
        super().__init__(self.message)
        self.kind, self.row_id, self.role, self.file = kind, row_id, role, str(file)
        self.item = item

    def __str__(self) -> str:
        name = self.row_id or ("" if self.item is None else f"item {self.item}")
        place = ", ".join(part for part in (name, self.role) if part)
        return f"{place}: {self.message}" if place else self.message


class Interrupted(BaseException):
    """A signal asked the command to stop.

    No Exception, which others catch and go on, and no KeyboardInterrupt, at which Lightning ends
    the process by itself.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of a message about a name that is not among these: the one that was meant, if any."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def typed(key: str, value: object) -> str:
    """`key=value` to paste into a shell behind one of the project's commands, whatever it holds."""
    text = str(value)
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text, re.ASCII)
    if not is_plain or text.lower() in ("null", "true", "false", "nan", "inf"):
        text = quoted(text)
    return shlex.quote(f"{key}={text}")


def quoted(text: object) -> str:
    """A text as Hydra's grammar takes it: of backslashes, only those before a quote are doubled."""
    doubled = re.sub(r'(\\+)("|\Z)', r"\1\1\2", str(text))
    return '"' + doubled.replace('"', r"\"") + '"'


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def extra(package: str, *, of: str, wanted_by: str) -> Any:
    """Import a package only where it is used.

    Args:
        of: the extra of this project that brings it.
        wanted_by: what needs it.

    Raises:
        UserError: without it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{wanted_by} needs {package}: pip install 'cocoa_pl[{of}]'") from error
