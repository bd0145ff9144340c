"""transformers' processors of the Qwen-VL families where torchvision is missing: they need it for
videos alone, and refuse to load without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.models.auto import processing_auto

from cocoa_pl.models.loading import FAMILIES


def processor_class(model_type: str) -> str | None:
    """The name of a family's stock processor; None for a family that transformers does not know."""
    names: Any = processing_auto
    found: str | None = dict(names.PROCESSOR_MAPPING_NAMES).get(model_type)
    return found


def has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


@contextmanager
def images_only() -> Iterator[None]:
    """Within it, `AutoProcessor` and `SentenceTransformer` open folders of these families without
    torchvision; what they open stays usable after. Videos cannot be read.

    Where torchvision is installed nothing is changed.
    """
    if has_torchvision():
        yield
        return
    stock = {}
    for model_type in FAMILIES:
        if name := processor_class(model_type):
            module = importlib.import_module(f"transformers.models.{model_type}")
            stock[module, name] = getattr(module, name)
    for (module, name), processor in stock.items():
        setattr(module, name, _without_videos(processor))
    try:
        yield
    finally:
        for (module, name), processor in stock.items():
            setattr(module, name, processor)


def _without_videos(stock: Any) -> Any:
    """The same processor; what it consists of is read off the arguments of its constructor."""

    def construct(
        self: Any,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        stock.__init__(
            self, image_processor, tokenizer, None, chat_template=chat_template, **kwargs
        )

    return type(stock.__name__, (stock,), {"__init__": construct, "__module__": stock.__module__})
