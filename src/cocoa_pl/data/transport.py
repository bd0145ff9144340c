"""What a data worker made in, the same in the training process out, without a file handle for every
small tensor.

torch hands each tensor over in shared memory of its own. A step holds hundreds of small ones (where
segments begin, who attends to whom), and a process may have only so many files open. Here they
travel as plain bytes; large ones, the pixels, go through shared memory as ever.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes; below, one copy through a pipe costs less than a file


class Parcel:
    """An object whose tensors are on the CPU, on its way between two processes."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def pin_memory(self) -> Parcel:
        """What a data loader calls where it is asked for page-locked memory."""
        return Parcel(self.content.pin_memory())

    def __reduce__(self) -> tuple[Callable[..., Parcel], tuple[bytes, list[Tensor]]]:
        large: list[Tensor] = []
        buffer = io.BytesIO()
        _Pickler(buffer, large).dump(self.content)
        return _arrived, (buffer.getvalue(), large)


def _arrived(packed: bytes, large: list[Tensor]) -> Parcel:
    return Parcel(_Unpickler(io.BytesIO(packed), large).load())


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, large: list[Tensor]) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.large = large
        self.places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor) or value.nbytes < LARGE:
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.large)
            self.large.append(value)
        return self.places[id(value)]

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, large: list[Tensor]) -> None:
        super().__init__(buffer)
        self.large = large

    def persistent_load(self, place: int) -> Tensor:
        return self.large[place]
