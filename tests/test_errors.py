"""A UserError keeps its message, also when a data worker raised it, and knows what it is about."""

import copy
import errno
import os
import pickle
import unicodedata
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper

from cocoa_pl.errors import UserError, absent, first_line

SENTENCE = "image a.png does not exist; check the path: all of it"


def about_an_image() -> UserError:
    return UserError(SENTENCE, kind="missing_image", row_id="toy row 5", role="query", file="a.png")


def test_row_and_role_come_before_the_message() -> None:
    assert str(UserError(SENTENCE)) == SENTENCE
    assert str(UserError(SENTENCE, row_id="toy row 5")) == f"toy row 5: {SENTENCE}"
    assert str(about_an_image()) == f"toy row 5, query: {SENTENCE}"
    error = UserError(SENTENCE, item=0)
    assert str(error) == f"item 0: {SENTENCE}"
    error.row_id = "toy row 5"  # by who knows what the item is called
    assert str(error) == f"toy row 5: {SENTENCE}"


def test_what_data_hold_acts_on_no_terminal_and_stops_no_log() -> None:
    error = UserError("image \ud800\x1b[2J.png is absolute", file="\ud800\x1b[2J.png")
    assert str(error) == r"image \ud800\x1b[2J.png is absolute"
    assert error.file == "\ud800\x1b[2J.png"  # for programs


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_copies_and_pickles_keep_message_and_fields(copied) -> None:  # type: ignore[no-untyped-def]
    error = about_an_image()
    again = copied(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_error_of_a_data_worker_comes_without_its_traceback() -> None:
    """Its fields stay behind: torch hands over a type and a text."""
    try:
        try:
            raise OSError("no such file")
        except OSError as error:
            raise about_an_image() from error
    except UserError:
        # What a DataLoader does with an exception of its worker (waiting for the worker of a real
        # one to end takes seconds).
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    assert "Traceback" in wrapped.exc_msg
    with pytest.raises(UserError) as caught:
        wrapped.reraise()
    assert str(caught.value) == str(about_an_image())


def test_why_a_file_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone").symlink_to("nothing")
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).mkdir()
    reasons = {
        "none": "does not exist; advice",
        "naïve": "does not exist; advice",
        ".": "is no file, but a folder; advice",
        "gone": "is a link to nothing, which does not exist; advice",
        "file/x": "cannot be reached: Not a directory; a part of the path is a file",
        "self": "cannot be reached: Too many levels of symbolic links; it is a link to itself",
        "x" * 300: "cannot be reached: File name too long; name a shorter one",
        composed: "does not exist, but the same name in another Unicode form does, ",
        f"{composed}/a.jsonl": "does not exist, but the same name in another Unicode form does, ",
    }
    for name, reason in reasons.items():
        path = os.path.join(tmp_path, name)
        shown = path if len(path) <= 255 else f"{path[:80]}..."
        assert str(absent(path, "advice")).startswith(f"{shown} {reason}")
    assert str(absent("tests", "go", what="image", wanted="image")).startswith("image tests is no")


def test_what_may_not_be_read_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "stat", stat)
    error = absent("closed/a.png", "advice", what="image", kind="missing_image")
    said = "image closed/a.png cannot be reached: Permission denied; its owner and mode do not"
    assert (error.kind, error.file, str(error)[: len(said)]) == (
        *("unreadable_file", "closed/a.png"),
        said,
    )


def test_what_the_system_says_is_the_file_and_the_reason() -> None:
    assert first_line(FileNotFoundError(2, "No such file or directory", b"a")) == (
        "a: No such file or directory"
    )
    arrows = "Failed to open local file 'a'"
    assert first_line(OSError(13, f"{arrows}. Detail: [errno 13] Permission denied")) == arrows
