"""Check numbers, bools and choices against the annotations of the parameters they are for.

A parameter declares its bounds in its annotation:

    def __init__(self, *, temperature: Positive, dims: Sequence[Count], steps: Count | None)
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from cocoa_pl.errors import UserError


class Bounds(NamedTuple):
    """Which numbers or lists a setting may be; NaN and infinity never."""

    words: str
    hold: Callable[[Any], bool]


Count = Annotated[int, Bounds("a whole number of at least 1", lambda n: n >= 1)]
Whole = Annotated[int, Bounds("a whole number of at least 0", lambda n: n >= 0)]
# What numpy, and with it Lightning, takes.
Seed = Annotated[int, Bounds("a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)]
Positive = Annotated[float, Bounds("a number above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Bounds("a number of at least 0", lambda x: x >= 0)]
Share = Annotated[float, Bounds("a number from 0 to 1", lambda x: 0 <= x <= 1)]
ShareAboveZero = Annotated[float, Bounds("a number above 0, at most 1", lambda x: 0 < x <= 1)]
Names = Annotated[Sequence[str], Bounds("a list of at least one", lambda names: len(names) > 0)]
ShareBelowOne = Annotated[float, Bounds("a number of at least 0, below 1", lambda x: 0 <= x < 1)]


def check_value(key: str, value: Any, annotation: Any) -> None:
    """Compare a value, and what lists and mappings hold, with an annotation.

    Numbers, bools, texts and literals are looked at; what an annotation says of others is not.

    Args:
        key: what the user calls it.

    Raises:
        UserError: for a value that does not fit the annotation.
    """
    choices = (
        get_args(annotation)
        if get_origin(annotation) in (Union, types.UnionType)
        else (annotation,)
    )
    kinds = [kind for kind in choices if kind is not types.NoneType]
    or_null = " or null" if types.NoneType in choices else ""
    if len(kinds) > 1 or (value is None and or_null):
        return
    kind, parts = get_origin(kinds[0]) or kinds[0], get_args(kinds[0])
    fits, words = True, ""
    if kind is Annotated:
        of_kind = (
            _is_number(value, parts[0]) if parts[0] in (int, float) else isinstance(value, list)
        )
        fits, words = of_kind and parts[1].hold(value), parts[1].words
    elif kind in (int, float):
        fits, words = _is_number(value, kind), "a whole number" if kind is int else "a number"
    elif kind is str:
        fits, words = isinstance(value, str), "a text"
    elif kind is bool:
        fits, words = isinstance(value, bool), "true or false"
    elif kind is Literal:
        fits, words = value in parts, f"one of {', '.join(map(_as_typed, parts))}"
    elif kind is tuple:
        fits, words = isinstance(value, list) and len(value) == len(parts), f"{len(parts)} values"
    elif kind is Sequence:
        fits, words = isinstance(value, list), "a list"
    elif kind is Mapping:
        fits, words = isinstance(value, dict), "a mapping"
    if not fits:
        raise UserError(f"{key}={_as_typed(value)} must be {words}{or_null}")
    if kind in (tuple, Sequence):
        for place, part in enumerate(value):
            check_value(f"{key}[{place}]", part, parts[place if kind is tuple else 0])
    elif kind is Mapping:
        for name, part in value.items():
            check_value(f"{key}.{name}", part, parts[1])


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _as_typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
