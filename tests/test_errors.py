"""A UserError keeps its message, also when a data worker raised it."""

import pickle

import pytest
from torch._utils import ExceptionWrapper

from cocoa_pl.errors import UserError

SENTENCE = "toy row 5: image a.png does not exist; check the path: all of it"


def test_message_is_kept_as_written() -> None:
    assert str(UserError(SENTENCE)) == SENTENCE
    assert str(pickle.loads(pickle.dumps(UserError(SENTENCE)))) == SENTENCE


def test_error_of_a_data_worker_comes_without_its_traceback() -> None:
    try:
        try:
            raise OSError("no such file")
        except OSError as error:
            raise UserError(SENTENCE) from error
    except UserError:
        # What a DataLoader does with an exception of its worker (waiting for the worker of a real
        # one to end takes seconds).
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    assert "Traceback" in wrapped.exc_msg
    with pytest.raises(UserError) as caught:
        wrapped.reraise()
    assert str(caught.value) == SENTENCE
