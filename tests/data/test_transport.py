"""Steps travel from the workers as one message, and arrive as they were."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cocoa_pl.data.transport import LARGE, Parcel

TENSORS = {
    "bool": torch.tensor([True, False]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "float": torch.randn(2, 3),
    "transposed": torch.arange(6).view(2, 3).T,
    "empty": torch.empty(0, 4, dtype=torch.int64),
    "scalar": torch.tensor(3.0),
    "large": torch.arange(LARGE // 8 + 5),
}


@dataclass(frozen=True)
class Content:
    tensors: dict[str, Tensor]
    words: tuple[str, ...]

    def pin_memory(self) -> Content:
        return Content(self.tensors, (*self.words, "pinned"))


class OneParcel(IterableDataset[Parcel]):
    def __iter__(self) -> Iterator[Parcel]:
        yield Parcel(Content(TENSORS, ("as", "sent")))


def assert_same(found: Any, wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_arrives_is_what_was_sent(num_workers: int) -> None:
    (parcel,) = DataLoader(OneParcel(), batch_size=None, num_workers=num_workers)
    assert parcel.content.words == ("as", "sent")
    assert_same(parcel.content.tensors, TENSORS)


def test_only_large_tensors_take_a_file_each() -> None:
    handed_over: list[int] = []

    class Counting(ForkingPickler):
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, Tensor):
                handed_over.append(value.nbytes)
            return NotImplemented

    class Nowhere:
        def write(self, _: bytes) -> None: ...

    Counting(Nowhere(), pickle.HIGHEST_PROTOCOL).dump(Parcel(Content(TENSORS, ())))
    assert handed_over == [TENSORS["large"].nbytes]


def test_a_tensor_that_is_named_twice_arrives_as_one() -> None:
    large, small = TENSORS["large"], TENSORS["float"]
    sent = Parcel({"a": large, "b": large, "c": small, "d": small})
    content = pickle.loads(pickle.dumps(sent)).content
    assert content["a"] is content["b"]
    assert content["c"] is content["d"]


def test_a_tensor_that_arrived_can_be_written_to() -> None:
    content = pickle.loads(pickle.dumps(Parcel({"a": torch.zeros(3)}))).content
    content["a"].add_(1)
    assert content["a"].tolist() == [1, 1, 1]


def test_pinning_is_left_to_the_content() -> None:
    assert Parcel(Content({}, ())).pin_memory().content.words == ("pinned",)
