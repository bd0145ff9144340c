"""Build plain objects from a config, after its values are checked.

Nothing below the entry points knows Hydra or OmegaConf.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_type_hints

from hydra._internal.utils import _locate
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cocoa_pl.config.bounds import (
    Count,
    NotNegative,
    Positive,
    Seed,
    ShareAboveZero,
    Whole,
    check_value,
)
from cocoa_pl.data.rows import OnBadRow
from cocoa_pl.errors import UserError, first_line

# Types of the keys that are no parameters of an object that a config builds.
VALUES: dict[str, Any] = {
    "seed": Seed,
    "num_workers": Whole,
    "checkpoint_every": Count,
    "evaluate": bool,
    **{"trainer.log_every_n_steps": Count, "trainer.num_nodes": Count},
    "on_bad_row": OnBadRow,
    "stage.order": Sequence[str],
    "model.dtype": Literal["float32", "bfloat16"],
    "model.gradient_checkpointing": bool,
    "model.max_length": Count,
    **dict.fromkeys(("model.min_pixels", "model.max_pixels", "model.eval_max_pixels"), Count),
    **{"batch_tokens": Count, "threads": Whole},  # of evaluate and mine
    **{"negatives": Count, "max_of_positive": ShareAboveZero, "keep": bool},  # of mine
    "workers": Whole | None,  # of doctor
    **{"gpus": Count | None, "mfu": ShareAboveZero, "lengths.rows": Count | None},  # of plan
    "lengths.image_tokens": Count | None,
    **{f"lengths.{of}": NotNegative for of in ("text", "negatives", "row_bytes", "image_kib")},
    **{f"lengths.images_per_{of}": NotNegative for of in ("query", "positive")},
    **{"assume.context_gib": NotNegative, "assume.slack": NotNegative},
    **{"hardware.memory_gib": Positive, "hardware.tflops": Mapping[str, Positive]},
}


def register_resolvers() -> None:
    """`${run_dir:RESUMED,NEW}` is the run folder, resumed or new; `${sum:A,B}` adds step counts."""
    OmegaConf.register_new_resolver("run_dir", lambda resumed, new: resumed or new, replace=True)
    OmegaConf.register_new_resolver("sum", lambda *terms: sum(terms), replace=True)


def check_values(node: DictConfig) -> None:
    """Refuse numbers, bools and choices that keys, or parameters of what the config makes, are not
    declared for, before anything is made.

    Raises:
        UserError: naming the key as a user would type it.
    """
    root, where = node._get_root(), node._get_full_key(None)
    plain = OmegaConf.to_container(root, resolve=False)
    for key, kind in declared(plain, where).items():
        if _raw(plain, key) == MISSING:
            continue
        try:
            value = OmegaConf.select(root, key)
            if OmegaConf.is_dict(value) and "_target_" in value:
                continue  # it has values of its own
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException:  # raised where it is needed
            continue
        check_value(_typed(plain, key), value, kind)
    for most in ("model.max_pixels", "model.eval_max_pixels"):
        if not where and "model" in node and OmegaConf.select(node, most) < node.model.min_pixels:
            least = node.model.min_pixels
            raise UserError(f"{most} must be at least model.min_pixels={least}")


def declared(plain: Any, where: str = "") -> dict[str, Any]:
    """Keys of a plain config, below one of them, and the annotations of what they are for."""
    found = {} if where else dict(VALUES)
    for key, target in _targets(_raw(plain, where) if where else plain, where):
        found |= {f"{key}.{name}": kind for name, kind in _parameters(target).items()}
    return found


def _targets(plain: Any, where: str) -> Iterator[tuple[str, str]]:
    """Places below one that make something, and what makes it."""
    if not isinstance(plain, dict):
        return
    if "_target_" in plain:
        yield where, plain["_target_"]
    for key, value in plain.items():
        if key != "hydra" or where:
            yield from _targets(value, f"{where}.{key}" if where else key)


@lru_cache
def _parameters(target: str) -> dict[str, Any]:
    """Annotations of a callable's parameters; none if it is not there, which `build` reports, or
    if they name what is imported for type checkers alone.
    """
    try:
        made: Any = _locate(target)
        if isinstance(made, type):
            made = made.__init__  # type: ignore[misc]
        return get_type_hints(made, include_extras=True)
    except (ImportError, AttributeError, ValueError, NameError):
        return {}


def _raw(plain: Any, key: str) -> Any:
    """What stands in a config, not resolved; `???` where nothing does."""
    for part in key.split("."):
        plain = plain.get(part, MISSING) if isinstance(plain, dict) else MISSING
    return plain


def _typed(plain: Any, key: str) -> str:
    """The key that a value comes from through interpolations."""
    while elsewhere := re.fullmatch(r"\$\{(\w[\w.]*)\}", str(_raw(plain, key))):
        key = elsewhere[1]
    return key


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a config node; lists and dicts arrive as plain Python.

    Raises:
        UserError: what a constructor says about a value that the user chose.
    """
    if isinstance(node, DictConfig):
        check_values(node)
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):  # UserError is one
            raise UserError(str(error.__cause__)) from error
        if str(error).startswith("Error locating target"):
            message = first_line(error).partition(",")[0]
            raise UserError(f"{message}; it must be importable (PYTHONPATH)") from error
        target = re.match(r"Error in call to target '([\w.]+)'", str(error))
        if target and "unexpected keyword argument" in str(error.__cause__):
            keys = ", ".join(_parameters(target[1]))
            raise UserError(f"{error.__cause__}; its keys are {keys}") from error
        raise
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} has no value; give it as {error.full_key}=..."
        ) from error
