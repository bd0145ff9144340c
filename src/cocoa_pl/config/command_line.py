"""Check a command line before Hydra does, and say in one sentence what is wrong with it.

Hydra's own refusals are many lines long, and about some mistakes it says nothing.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cocoa_pl.config.build import check_values
from cocoa_pl.config.saved import settled
from cocoa_pl.errors import UserError, first_line

# A link to the repository's conf/, and a folder of the wheel.
CONFIGS = (Path(__file__).parents[1] / "conf").resolve()
SETTING = ("experiment", "arm")  # groups whose files set values of others


def check_command_line(config_name: str) -> DictConfig | None:
    """Compose once before Hydra does, to turn its refusals into one sentence with the nearest name:
    also where configs of the user's own are added (`--config-dir`) or take the place of ours.

    Returns:
        The config, as of `check_overrides`; None where Hydra only shows something.

    Raises:
        UserError: for an unknown key, group or option, or a value of the wrong kind.
    """
    given = get_args_parser().parse_args(sys.argv[1:])
    if given.experimental_rerun:
        raise UserError(
            "--experimental-rerun would write into the folder of the run that it repeats; give "
            "what is in its .hydra/overrides.yaml to a new run, or go on with it by resume=RUN"
        )
    places = Places.given(given.config_path, given.config_dir)
    config = check_overrides(given.config_name or config_name, given.overrides, places)
    config.hydra.mode = RunMode.MULTIRUN if given.multirun else config.hydra.mode
    shown = (given.cfg, given.info, given.help, given.hydra_help, given.shell_completion)
    return None if any(shown) else config


def add_override(word: str) -> None:
    """One more for Hydra, behind all options, where processes that Lightning starts get theirs."""
    overrides = get_args_parser().parse_args(sys.argv[1:]).overrides
    options = list(sys.argv[1:])
    for override in overrides:
        options.remove(override)
    sys.argv[1:] = [*options, *overrides, word]


@dataclass(frozen=True)
class Places:
    """Folders where configs are looked for, as Hydra does.

    Args:
        main: a folder, or `pkg://` and a package.
        added: folders behind it.
    """

    main: str = str(CONFIGS)
    added: tuple[str, ...] = ()

    @staticmethod
    def given(main: str | None, added: str | None) -> Places:
        """As of `--config-path`, which is relative to the script, and `--config-dir`.

        Raises:
            UserError: for a folder that is not there, or a file of an added one that stands behind
                one of ours, which Hydra reads in its place without a word.
        """
        if main is not None and not main.startswith("pkg://"):
            main = str(Path(sys.argv[0]).resolve().parent / main)
        for option, folder in (("--config-path", main), ("--config-dir", added)):
            if folder is not None and not folder.startswith("pkg://") and not Path(folder).is_dir():
                raise UserError(f"{option}: there is no folder {folder}")
        if added is None:
            return Places() if main is None else Places(main)
        places = Places(main or str(CONFIGS), (str(Path(added).resolve()),))
        for file in sorted(Path(added).rglob("*.yaml")):
            ours = Path(places.main) / file.relative_to(added)
            if ours.is_file() and ours.read_bytes() != file.read_bytes():
                raise UserError(f"{file} is never read: {ours} comes first; name it otherwise")
        return places

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within this, Hydra composes from here."""
        package = self.main.removeprefix("pkg://")
        with (
            initialize_config_dir(self.main, version_base="1.3")
            if package == self.main
            else initialize_config_module(package.replace("/", "."), version_base="1.3")
        ):
            yield

    def search(self, overrides: Sequence[Override]) -> list[str]:
        """Nothing, or one override that adds these folders to those that overrides name."""
        named: list[Any] = [o.value() for o in overrides if o.key_or_group == "hydra.searchpath"]
        folders = [*(named[-1] if named else ()), *self.added]
        quoted = ",".join("'" + folder.replace("'", r"\'") + "'" for folder in folders)
        return [f"hydra.searchpath=[{quoted}]"] if folders else []


def compose_overrides(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The config that these overrides choose, for a command that is not run by Hydra.

    Raises:
        UserError: as `check_overrides`, and for several values of a key, which only a sweep takes.
    """
    config = check_overrides(config_name, overrides)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: one value at a time; there are no sweeps here")
    with Places().opened():
        return settled(config)


def check_overrides(
    config_name: str, overrides: Sequence[str], places: Places = Places()
) -> DictConfig:
    """Compose these overrides once, to say in one sentence what is wrong with them.

    Returns:
        The config, Hydra's own part included, of the first value of each key.

    Raises:
        UserError: for an unknown key, group or option, or a value of the wrong kind.
    """
    parser = OverridesParser.create()
    try:
        parsed = parser.parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"{first_line(error)}; write key=value") from error
    values = [_values(o, text) for o, text in zip(parsed, overrides, strict=True)]
    with places.opened():
        search = places.search(parsed)
        options = partial(_options, places, config_name, tuple(search))
        for override in parser.parse_overrides(list(chain.from_iterable(values))):
            _check_option(override, options)
        single = [texts[0] for texts in values]
        first = parser.parse_overrides(single)
        groups = [o for o in first if options(o.key_or_group)]
        composed = partial(_compose_groups, places, config_name, least=tuple(search))
        try:
            chosen = composed((*(o.input_line for o in groups), *search))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(first_line(error)) from error
        try:
            config = compose(config_name, overrides=[*single, *search], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, _keys(chosen))) from error
        choices = dict(config.hydra.runtime.choices)
        for group, name in choices.items():  # those that configs choose too
            if isinstance(name, str) and "/" not in group + name and "@" not in group:
                _check_name(group, name, options(group))
        for override in first:
            if not options(override.key_or_group):
                _check_group(chosen, override, choices)
        if any(o.key_or_group in SETTING for o in groups):
            rest = [o.input_line for o in groups if o.key_or_group not in SETTING]
            _check_set(chosen, composed((*rest, *search)))
    check_values(config)
    return config


def _values(override: Any, text: str) -> list[str]:
    """An override once for each value of a sweep; otherwise itself alone."""
    if not override.is_sweep_override():
        return [text]
    return [f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()]


@lru_cache(maxsize=512)
def _options(
    places: Places, config_name: str, search: tuple[str, ...], group: str
) -> tuple[str, ...]:
    """Of a group of configs, in whichever folder; none of what is no group."""
    if "." in group:
        return ()
    loader = GlobalHydra.instance().config_loader()
    found = loader.get_group_options(group, ObjectType.CONFIG, config_name, list(search))
    return tuple(sorted(found))


def _check_option(override: Override, options: Callable[[str], Sequence[str]]) -> None:
    """Hydra says nothing when an optional group's option does not exist."""
    group, names = override.key_or_group, override.value()
    if override.is_delete() or not options(group):
        return
    for name in names if isinstance(names, list) else [names]:
        if isinstance(name, str) and "/" not in name and "$" not in name:
            _check_name(override.get_key_element().lstrip("+"), name, options(group))


def _check_name(group: str, name: str, options: Sequence[str]) -> None:
    if name not in options:
        raise UserError(
            f"{group}={name} does not exist{_nearest(name, options)}; there are "
            f"{', '.join(options)}"
        )


@lru_cache(maxsize=8)  # composing takes a third of a second
def _compose_groups(
    places: Places, config_name: str, groups: tuple[str, ...], least: tuple[str, ...]
) -> DictConfig:
    """The config with the groups that the command line chooses, before it sets single values."""
    try:
        return compose(config_name, overrides=list(groups))
    except (HydraException, OmegaConfBaseException, ValueError):
        return compose(config_name, overrides=list(least))


def _check_set(cfg: DictConfig, without: DictConfig) -> None:
    """Hydra says nothing when a file that sets values of others misspells their keys.

    Args:
        without: the config without such files.
    """
    for group in ("model", "stage"):
        known = _keys(without.get(group, {}), f"{group}.")
        for key in _keys(cfg.get(group, {}), f"{group}."):
            if key not in known and not key.startswith("model.source."):
                raise UserError(f"unknown key {key}{_nearest(key, known)}, in an experiment's file")


def _check_group(cfg: DictConfig, override: Override, choices: Iterable[str]) -> None:
    """A group of values is not one value."""
    key, value = override.key_or_group, override.value()
    if override.is_add() or override.is_delete() or str(value).startswith("${"):
        return
    try:
        default = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # has no value yet
        return
    if isinstance(default, DictConfig) and not isinstance(value, dict):
        placed = next((group for group in choices if group.endswith(f"@{key}")), None)
        hint = f"{placed}={value}" if placed else f"{key}.{next(iter(default))!s}=..."
        raise UserError(f"{key} holds several values; did you mean {hint}?")


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
        name = full[1] if full else key[1]
        return f"unknown key {name}{_nearest(name, keys)}"
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
