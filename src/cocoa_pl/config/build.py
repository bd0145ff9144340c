"""Build plain objects from a config, after its values are checked.

Nothing below the entry points knows Hydra or OmegaConf.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any, Literal, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cocoa_pl.config.bounds import (
    Count,
    Names,
    NotNegative,
    Positive,
    Seed,
    ShareAboveZero,
    Whole,
    check_value,
)
from cocoa_pl.data.rows import OnBadRow
from cocoa_pl.errors import UserError, first_line, nearest

Target = tuple[str, Mapping[str, Any], Any]

# Types of the keys that are no parameters of an object that a config builds.
VALUES: dict[str, Any] = {
    "seed": Seed,
    "num_workers": Whole,
    "checkpoint_every": Count,
    "evaluate": bool,
    **{"trainer.log_every_n_steps": Count, "trainer.num_nodes": Count},
    "trainer.deterministic": Literal[True, False, "warn"],
    "on_bad_row": OnBadRow,
    **{"stage.order": Names, "stage.token_budget": Count, "stage.validate_every": Count},
    **{"stage.validation_batch_size": Count, "stage.weight_decay": NotNegative},
    "stage.clip_norm": NotNegative | None,
    "model.kernel": Literal["auto", "sdpa", "varlen", "flash"],
    "model.dtype": Literal["float32", "bfloat16"],
    "model.gradient_checkpointing": bool,
    "model.max_length": Count,
    **dict.fromkeys(("model.min_pixels", "model.max_pixels", "model.eval_max_pixels"), Count),
    **{"model.num_workers": Whole, "model.eos_token": str | None},
    # Of evaluate and mine.
    "device": str,
    **{"batch_tokens": Count, "threads": Whole, "store_dtype": Literal["float16", "float32"]},
    **{"negatives": Count, "max_of_positive": ShareAboveZero, "keep": bool},  # of mine
    "workers": Whole | None,  # of doctor
    **{"gpus": Count | None, "lengths.rows": Count | None},  # of plan
    **{"lengths.image_tokens": Count | None, "lengths.text": Whole, "lengths.negatives": Whole},
    **{f"lengths.images_per_{of}": NotNegative for of in ("query", "positive")},
    **{"assume.context_gib": NotNegative, "assume.slack": NotNegative},
    **{"hardware.memory_gib": Positive, "hardware.tflops": Mapping[str, Positive]},
    "hardware.bandwidth": Positive,
}


def check_values(cfg: DictConfig) -> None:
    """Refuse what cannot be meant in a whole config, before anything of it is made: one word for a
    section of several values, keys that a callable does not take or needs, and numbers, bools and
    choices that a key is not declared for.

    Raises:
        UserError: naming the key as a user would type it.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    made_there = list(callables(plain))
    written, kinds = dict(walk(plain)), declared(made_there)
    _check_sections(cfg, kinds)
    for where, node, made in made_there:
        _check_keys(where, node, made)
    for section in ("model", "stage"):  # they hold values, and what is made
        known = {key.partition(".")[2] for key in VALUES if key.startswith(f"{section}.")}
        for key, value in plain.get(section, {}).items():
            if key not in known and not (isinstance(value, dict) and "_target_" in value):
                hint = nearest(key, known | plain[section].keys() - {key})
                raise UserError(f"unknown key {section}.{key}{hint}")
    for key, kind in kinds.items():
        value = _resolved(cfg, key)
        is_made = isinstance(value, dict) and "_target_" in value  # it has values of its own
        while elsewhere := re.fullmatch(r"\$\{(\w[\w.]*)\}", str(written.get(key))):
            key = elsewhere[1]  # where the value is typed
        if value != MISSING and not is_made:
            check_value(key, value, kind)
    pixels = [f"model.{of}_pixels" for of in ("min", "max", "eval_max")] if "model" in cfg else ()
    for most in pixels:
        if _resolved(cfg, most) == MISSING:
            raise UserError(f"{most} has no value; give it as {most}=...")
        if OmegaConf.select(cfg, most) < cfg.model.min_pixels:
            raise UserError(f"{most} must be at least model.min_pixels={cfg.model.min_pixels}")


def walk(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """A node of a plain config and all that is in it, by their keys from the root on."""
    yield key, node
    for name, inner in node.items() if isinstance(node, dict) else ():
        yield from walk(inner, f"{key}.{name}".lstrip("."))


def declared(made_there: Iterable[Target]) -> dict[str, Any]:
    """Keys of a plain config, and the annotations of what they are for."""
    found: dict[str, Any] = {}
    for where, _, made in made_there:
        function = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]
        with suppress(NameError, TypeError):  # imported for type checkers alone; no function
            kinds = get_type_hints(function, include_extras=True)
            found |= {f"{where}{name}": kind for name, kind in kinds.items()}
    return found | VALUES


def callables(plain: Any) -> Iterator[Target]:
    """Prefix of keys, node and callable of all that is made; `build` reports what is not there."""
    for key, node in walk(plain):
        if isinstance(node, dict) and "_target_" in node:
            try:
                made = resolve_name(node["_target_"])
            except (ImportError, AttributeError, ValueError):
                continue
            yield f"{key}.".lstrip("."), node, made


def _resolved(cfg: DictConfig, key: str) -> Any:
    """A plain value; `???` if there is none, or none that resolves, which its reader reports."""
    try:
        value = OmegaConf.select(cfg, key, default=MISSING)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return MISSING


def _check_sections(cfg: DictConfig, kinds: Mapping[str, Any]) -> None:
    """Refuse one word for a section of several values, which Hydra takes."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else ()
    groups = {name.rpartition("@")[2]: name for name in choices if "@" in name}
    ours = [key for key, kind in kinds.items() if str(kind).startswith("<class 'cocoa_pl.")]
    sections = (key.rpartition(".")[0] for key in kinds if "." in key)
    for place in dict.fromkeys((*groups, *ours, *sections)):
        value: Any = {}
        with suppress(OmegaConfBaseException):  # raised where it is needed
            value = OmegaConf.select(cfg, place, default={})
        if isinstance(value, str | int | float) or (value is None and place in ours):
            hint = f"{groups[place]}={value}" if place in groups else f"{place}.KEY=..."
            raise UserError(f"{place} holds several values; did you mean {hint}?")


def _check_keys(where: str, node: Mapping[str, Any], made: Any) -> None:
    try:
        parameters = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):  # no function, or written in C
        return
    # `**shared` of a stage's module is for what the code fills in.
    if any(p.kind is p.VAR_KEYWORD and p.name != "shared" for p in parameters):
        return
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    for key in node:
        if not str(key).startswith("_") and key not in names:
            hint = nearest(str(key), names) or f"; there are {', '.join(names)}"
            raise UserError(f"unknown key {where}{key}{hint}")
    if "_partial_" in node or "_args_" in node:
        return
    for p in parameters:
        if p.default is p.empty and p.name not in node and p.kind is not p.VAR_KEYWORD:
            raise UserError(f"{where}{p.name} is missing, which {node['_target_']} needs")


def build(node: Any) -> Any:
    """Instantiate a config node; lists and dicts arrive as plain Python.

    Raises:
        UserError: what a constructor says about a value that the user chose.
    """
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        if isinstance(error.__cause__, ValueError):
            raise UserError(str(error.__cause__)) from error
        if str(error).startswith("Error locating target"):
            message = first_line(error).partition(",")[0]
            raise UserError(f"{message}; it must be importable (PYTHONPATH)") from error
        raise
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from error


def unresolved(error: OmegaConfBaseException) -> str:
    """What is wrong with a value of a config, and of a missing one how to give it."""
    if missing := re.search(r"Missing mandatory value: (\S+)", str(error)):
        return f"{missing[1]} has no value; give it as {missing[1]}=..."
    return first_line(error).rpartition("resolving interpolation: ")[2]
