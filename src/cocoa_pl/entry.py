"""Command line and YAML in, plain objects out: what `train.py` and `evaluate.py` share.

Nothing behind this module knows Hydra or OmegaConf.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler
from transformers.utils import logging as transformers_logging

from cocoa_pl.errors import UserError
from cocoa_pl.stages.recipe import Interrupted

CONFIGS = Path(__file__).parents[2] / "conf"
MISTAKE, INTERRUPTED = 2, 130  # exit statuses
RESUMABLE = ("trainer.", "logger", "num_workers", "checkpoint_every", "evaluate")

# What Lightning warns of although nobody can or should do anything about it.
HARMLESS = (
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # its own use of torch's pytrees
    "The number of training batches .* is smaller than the logging interval",  # a short stage
    "It is recommended to use .*sync_dist=True",  # values are summed over ranks before
    "You're resuming from a checkpoint that ended before",  # the sampler counts steps, not epochs
)

log = logging.getLogger(__name__)


def register_resolvers() -> None:
    """`${run_dir:RESUMED,NEW}` is the run folder, resumed or new; `${sum:A,B}` adds step counts."""
    OmegaConf.register_new_resolver("run_dir", lambda resumed, new: resumed or new, replace=True)
    OmegaConf.register_new_resolver("sum", lambda *terms: sum(terms), replace=True)


def check_command_line(config_name: str) -> None:
    """Compose once before Hydra does, to turn its refusals into one sentence with the nearest name.

    Raises:
        UserError: for an unknown key, group or option, or a value of the wrong kind.
    """
    arguments = get_args_parser().parse_args(sys.argv[1:])
    if arguments.config_name or arguments.config_path or arguments.config_dir:
        return  # the configs are not ours
    try:
        parsed = OverridesParser.create().parse_overrides(arguments.overrides)
    except HydraException as error:
        raise UserError(f"{_first_line(error)}; write key=value") from error
    values = [_values(o, text) for o, text in zip(parsed, arguments.overrides, strict=True)]
    for text in chain.from_iterable(values):
        _check_option(text)
    single = [texts[0] for texts in values]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        chosen = _compose_groups(config_name, single)
        try:
            compose(config_name, overrides=single, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, _keys(chosen))) from error
    for override, text in zip(
        OverridesParser.create().parse_overrides(single), single, strict=True
    ):
        _check_kind(chosen, override, text)


def guarded(run: Callable[[], None]) -> int:
    """Run an entry point; what a user did wrong becomes one sentence and an exit status."""
    transformers_logging.disable_progress_bar()  # one line for each file it opens
    try:
        run()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except OmegaConfBaseException as error:  # a value of the config, which is the user's
        sys.stderr.write(f"error: {_first_line(error)}\n")
        return MISTAKE
    except (Interrupted, KeyboardInterrupt) as stop:
        sys.stderr.write(f"{str(stop) or 'interrupted'}\n")
        return INTERRUPTED
    return 0


def set_up_logging(run_dir: Path) -> Console:
    """Log lines to the console that progress bars use, and with times to the run's `log.txt`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    screen: logging.Handler = (
        RichHandler(console=console, show_path=False, show_time=False, show_level=False)
        if console.is_terminal
        else logging.StreamHandler(sys.stdout)
    )
    screen.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(run_dir / "log.txt")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    is_first: bool = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    level = logging.INFO if is_first else logging.WARNING  # of several processes one talks
    logging.basicConfig(level=level, handlers=[screen, file], force=True)
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    for chatty in ("lightning.pytorch", "lightning.fabric", "httpx", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return console


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of the run to resume, with the few keys that may change.

    Raises:
        UserError: if there is no such run, or a key is given that would make it another run.
    """
    saved = Path(cfg.resume) / "config.yaml"
    if not saved.is_file():
        raise UserError(f"resume={cfg.resume}: there is no run (no config.yaml) in that folder")
    resumed = OmegaConf.load(saved)
    assert isinstance(resumed, DictConfig)
    changed = [o for o in overrides if not o.startswith("resume=")]
    if wrong := [o for o in changed if not o.startswith(RESUMABLE)]:
        raise UserError(f"a resumed run keeps its config; {wrong[0]} cannot be changed")
    for override in changed:
        key = override.split("=", 1)[0]
        OmegaConf.update(resumed, key, OmegaConf.select(cfg, key))
    with open_dict(resumed):
        resumed.resume = cfg.resume
    return resumed


def save_config(cfg: DictConfig, run_dir: Path) -> None:
    """The resolved config, from which the run can be repeated and resumed."""
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a config node; lists and dicts arrive as plain Python.

    Raises:
        UserError: what a constructor says about a value that the user chose.
    """
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):  # UserError is one
            raise UserError(str(error.__cause__)) from error
        raise
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} has no value; give it as {error.full_key}=..."
        ) from error


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


def _compose_groups(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The config with the groups that the command line chooses, before it sets single values."""
    groups = [o for o in overrides if (CONFIGS / o.lstrip("+").partition("=")[0]).is_dir()]
    try:
        return compose(config_name, overrides=groups)
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
    message = _first_line(error)
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
