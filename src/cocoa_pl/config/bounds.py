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


# Of annotations without bounds: the types of their values in a config, and their name.
KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a text"),
    bool: (bool, "true or false"),
    Sequence: (list, "a list"),
    Mapping: (dict, "a mapping"),
}


def check_value(key: str, value: Any, annotation: Any) -> None:
    """Compare a value, and what lists and mappings hold, with an annotation.

    Numbers, bools, texts and literals are looked at; what an annotation says of others is not.

    Args:
        key: what the user calls it.

    Raises:
        UserError: for a value that does not fit the annotation.
    """
    is_union = get_origin(annotation) in (Union, types.UnionType)
    choices = get_args(annotation) if is_union else (annotation,)
    chosen = [kind for kind in choices if kind is not types.NoneType]
    or_null = " or null" if types.NoneType in choices else ""
    if len(chosen) > 1 or (value is None and or_null):
        return
    is_bounded = get_origin(chosen[0]) is Annotated
    plain, *bounds = get_args(chosen[0]) if is_bounded else chosen
    kind, parts = get_origin(plain) or plain, get_args(plain)
    if kind is Literal:
        fits, words = value in parts, f"one of {', '.join(map(_as_typed, parts))}"
    elif kind is tuple:
        fits, words = isinstance(value, list) and len(value) == len(parts), f"{len(parts)} values"
    else:
        made, words = KINDS.get(kind, (object, ""))
        fits = isinstance(value, made)
    if kind in (int, float):
        fits = fits and not isinstance(value, bool) and abs(value) < math.inf
    for bound in bounds:
        fits, words = fits and bound.hold(value), bound.words
    if not fits:
        raise UserError(f"{key}={_as_typed(value)} must be {words}{or_null}")
    if kind is Mapping:
        for name, part in value.items():
            check_value(f"{key}.{name}", part, parts[1])
    elif kind in (tuple, Sequence) and not bounds:
        for place, part in enumerate(value):
            check_value(f"{key}[{place}]", part, parts[place if kind is tuple else 0])


def _as_typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
