"""A UserError keeps its message, also when a data worker raised it, and knows what it is about."""

import copy
import pickle

import pytest
from torch._utils import ExceptionWrapper

from cocoa_pl.errors import UserError

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
