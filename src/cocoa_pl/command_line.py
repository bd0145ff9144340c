"""A command line in; nothing out, or one sentence on what is wrong and the nearest right name.

Hydra's own refusals are many lines long, and about some mistakes it says nothing.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cocoa_pl.entry import check_values
from cocoa_pl.errors import UserError, first_line

# A link to the repository's conf/, and a folder of the wheel.
CONFIGS = (Path(__file__).parent / "conf").resolve()


def check_command_line(config_name: str) -> None:
    """Compose once before Hydra does, to turn its refusals into one sentence with the nearest name.

    Raises:
        UserError: for an unknown key, group or option, or a value of the wrong kind.
    """
    arguments = get_args_parser().parse_args(sys.argv[1:])
    if arguments.config_name or arguments.config_path or arguments.config_dir:
        return  # the configs are not ours
    check_overrides(config_name, arguments.overrides)


def compose_overrides(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The config that these overrides choose, for a command that is not run by Hydra.

    Raises:
        UserError: as `check_overrides`, and for several values of a key, which only a sweep takes.
    """
    config = check_overrides(config_name, overrides)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: one value at a time; there are no sweeps here")
    with open_dict(config):
        del config["hydra"]
    return config


def check_overrides(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose these overrides once, to say in one sentence what is wrong with them.

    Returns:
        The config, Hydra's own part included, of the first value of each key.

    Raises:
        UserError: for an unknown key, group or option, or a value of the wrong kind.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"{first_line(error)}; write key=value") from error
    values = [_values(o, text) for o, text in zip(parsed, overrides, strict=True)]
    for text in chain.from_iterable(values):
        _check_option(text)
    single = [texts[0] for texts in values]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        groups = [o for o in single if (CONFIGS / o.lstrip("+").partition("=")[0]).is_dir()]
        chosen = _compose_groups(config_name, tuple(groups))
        try:
            config = compose(config_name, overrides=single, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, _keys(chosen))) from error
    for override, text in zip(
        OverridesParser.create().parse_overrides(single), single, strict=True
    ):
        _check_kind(chosen, override, text)
    check_values(config)
    return config


def _values(override: Any, text: str) -> list[str]:
    """An override once for each value of a sweep; otherwise itself alone."""
    if not override.is_sweep_override():
        return [text]
    return [f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()]


def _check_option(text: str) -> None:
    """Hydra says nothing when an optional group's option does not exist."""
    key, _, name = text.lstrip("+").partition("=")
    folder = CONFIGS / key.partition("@")[0]
    if not key or not folder.is_dir() or name in ("", "null"):
        return
    options = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in options:
        raise UserError(
            f"{key}={name} does not exist{_nearest(name, options)}; there are {', '.join(options)}"
        )


@lru_cache(maxsize=8)  # composing takes a third of a second
def _compose_groups(config_name: str, groups: tuple[str, ...]) -> DictConfig:
    """The config with the groups that the command line chooses, before it sets single values."""
    try:
        return compose(config_name, overrides=list(groups))
    except (HydraException, OmegaConfBaseException, ValueError):
        return compose(config_name)


def _check_kind(cfg: DictConfig, override: Any, text: str) -> None:
    """A number stays a number, a list a list, and a group of values is not one value."""
    key: str = override.key_or_group
    value: Any = override.value()
    if override.is_add() or override.is_delete() or "=" not in text or (CONFIGS / key).is_dir():
        return
    try:
        default = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # has no value yet
        return
    if isinstance(value, str) and value.startswith("${"):
        return
    if isinstance(default, DictConfig) and not isinstance(value, dict):
        options = [group.parent.name for group in CONFIGS.glob(f"*/{value}.yaml")]
        hint = f"{options[0]}@{key}={value}" if options else f"{key}.{next(iter(default))!s}=..."
        raise UserError(f"{key} holds several values; did you mean {hint}?")
    if isinstance(default, ListConfig) and not isinstance(value, list):
        raise UserError(f"{key} is a list; write {key}=[{value}]")
    numbers = isinstance(default, int | float)
    if numbers and not (value is None or isinstance(value, int | float)):
        raise UserError(f"{text}: this key needs a value like {default}")


def _explain(error: Exception, keys: Sequence[str]) -> str:
    """Hydra's message with the nearest existing name."""
    message = first_line(error)
    if "submitit" in message:
        return 'cluster=slurm needs the submitit launcher: pip install "cocoa-pl[slurm]"'
    if placed := re.search(r"[Cc]ould not override '([^'@]+)@([^']+)'", message):
        places = [key for key in keys if key.rpartition(".")[2] == placed[2].rpartition(".")[2]]
        return f"unknown key {placed[2]}{_nearest(placed[2], places)}"
    if key := re.search(r"[Kk]ey '([^']+)' (?:is not in struct|not in)", str(error)):
        full = re.search(r"override '([^']+)'", str(error))
        wanted = full[1] if full else key[1]
        return f"unknown key {wanted}{_nearest(wanted, keys)}"
    if group := re.search(r"override '([^'@=]+)[@=]?", message):
        return f"unknown key {group[1]}{_nearest(group[1], keys)}"
    return message


def _keys(cfg: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in cfg:
        keys.append(f"{prefix}{key}")
        if isinstance(child := cfg._get_node(key), DictConfig) and not child._is_none():
            keys += _keys(child, f"{prefix}{key}.")
    return keys


def _nearest(name: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
