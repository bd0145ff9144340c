"""What ends a command without a traceback: a mistake of the user, and a signal."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import shlex
import stat
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
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
        return visible(f"{place}: {self.message}" if place else self.message)


class Interrupted(BaseException):
    """A signal asked the command to stop.

    No Exception, which others catch and go on, and no KeyboardInterrupt, at which Lightning ends
    the process by itself.
    """


def visible(text: object, *, lines: bool = False) -> str:
    """A text for the eye: what would act on a terminal, is in no encoding or may be in no page, as
    an escape; with `lines`, tabs and line ends stay.
    """
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]",
        lambda found: (
            found[0]
            if lines and found[0] in "\t\r\n"
            else found[0].encode("unicode_escape").decode()
        ),
        str(text),
    )


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
    """The first line of another library's message, or the error's kind where it has none; of the
    system, the file and what it says of it.
    """
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{_shown(error.filename)}: "
        return place + str(error.strerror).partition(". Detail: ")[0]  # pyarrow says it twice
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _shown(path: str | bytes | PathLike[Any]) -> str:
    """A path for messages; the beginning of one that no disk takes."""
    text = os.fsdecode(path)
    return text if len(text) <= 255 else f"{text[:80]}..."


_NO_ROOM = "make room, or name a folder elsewhere"
_NOT_ALLOWED = "its owner and mode do not allow it"
# By the system's number: what is meant, or what to do.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "name a file",
    errno.EEXIST: "it is in the way of a folder; name another",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.ELOOP: "it is a link to itself",
    errno.EROFS: "name a folder elsewhere",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_ROOM),
    errno.EMFILE: "raise the limit, ulimit -n",
    errno.EIO: "the disk or the network behind it fails",
}


def system_error(error: OSError) -> str:
    """What the system says of a file or a device, and what to do, as one sentence."""
    remedy = REMEDIES.get(error.errno or 0)
    return first_line(error) + (f"; {remedy}" if remedy else "")


def absent(
    path: str | PathLike[str], advice: str, *, what: str = "", kind: str = "", wanted: str = "file"
) -> UserError:
    """The error about a file, or a folder, that is not there: why, and what to do.

    Args:
        what: said before its name, such as `image`.
        kind: of the error; of one that may be there and cannot be reached, `unreadable_file`.
    """
    said = "does not exist"
    try:
        mode = os.stat(path).st_mode
        said = f"is no {wanted}, but a folder" if stat.S_ISDIR(mode) else f"is no {wanted}"
    except FileNotFoundError:
        if os.path.islink(path):
            said = f"is a link to {os.readlink(path)}, which does not exist"
        elif _has_twin(os.fspath(path)):
            said += (
                ", but the same name in another Unicode form does, as macOS writes accents; rename "
                "it (convmv --nfc)"
            )
    except OSError as error:
        kind, advice = "unreadable_file", REMEDIES.get(error.errno or 0, advice)
        said = f"cannot be reached: {error.strerror}"
    except ValueError as error:  # a null byte or an unpaired surrogate
        said = f"is no path ({error})"
    name = f"{what} {_shown(path)}".strip()
    return UserError(f"{name} {said}; {advice}", kind=kind, file=path)


def _has_twin(path: str) -> bool:
    """Whether the path differs from one that is there in nothing but how its accents are coded."""
    folder, name = os.path.split(path)
    while folder not in ("", os.sep) and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    return not name.isascii() and unicodedata.normalize("NFC", name) in _composed(folder)


@lru_cache(maxsize=16)
def _composed(folder: str) -> frozenset[str]:
    """Names in a folder, each accent in its letter; a corpus may lack a million of its files."""
    try:
        return frozenset(unicodedata.normalize("NFC", n) for n in os.listdir(folder or os.curdir))
    except OSError:
        return frozenset()


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
