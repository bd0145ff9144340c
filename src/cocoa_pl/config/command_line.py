"""Start commands as Hydra apps: values may hold any letters, and a refusal is one sentence."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import hydra
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cocoa_pl.config.build import check_values, walk
from cocoa_pl.config.folders import leave_sweep, run_folder
from cocoa_pl.config.process import RESUME, guarded
from cocoa_pl.distributed.processes import INTERRUPTED
from cocoa_pl.errors import UserError, first_line, nearest, quoted, typed

# A link to the repository's conf/, and a folder of the wheel.
CONFIGS = (Path(__file__).parents[1] / "conf").resolve()
# Hydra's own, each in a package that is not a part of it.
PLUGINS = {
    "launcher": ("joblib", "ray", "rq", "submitit"),
    "sweeper": ("ax", "nevergrad", "optuna"),
}
# Of Hydra's options those with a value of their own.
TAKE_VALUES = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"),
    *("--cfg", "-c", "--package", "-p", "--info", "-i"),
)

# `${run_dir:RESUMED,NEW}` is the run folder, resumed or new; `${sum:A,B}` adds step counts.
OmegaConf.register_new_resolver("run_dir", run_folder, replace=True, use_cache=True)
OmegaConf.register_new_resolver("sum", lambda *terms: sum(terms), replace=True)


def run_app(
    config_name: str,
    task: Callable[[DictConfig], int | None],
    words: Sequence[str],
    *,
    remedy: str = RESUME,
) -> int:
    """Run a task as a Hydra app, once or for each run of a sweep, and print mistakes.

    Args:
        config_name: a file of conf/.
        task: what it returns is the exit status of its run; None is 0.
        remedy: what to do when another process of the job was lost.

    Returns:
        The highest exit status of the runs, or 2 if Hydra refuses the words.
    """
    statuses: list[int] = []
    is_composed = False

    @functools.wraps(task)
    def job(cfg: DictConfig) -> None:
        nonlocal is_composed
        is_composed = True

        def run() -> int | None:
            _check_sources()
            _check_sections(cfg, config_name)
            check_values(cfg)
            return task(cfg)

        sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
        with _as_before() if sweeps else nullcontext():
            statuses.append(guarded(run, remedy=remedy))
        folder = Path(HydraConfig.get().runtime.output_dir)
        if statuses[-1] and folder != Path.cwd():
            with suppress(OSError):  # there are files of a run that had begun
                folder.rmdir()
        if sweeps and statuses[-1] == INTERRUPTED:
            sys.exit(INTERRUPTED)  # ends the sweep; a mistake in one run does not

    def start() -> int:
        if any(word.startswith("--experimental") for word in words):
            raise UserError(
                "--experimental-rerun would write into the folder of the run that it repeats; give "
                "what is in its .hydra/overrides.yaml to a new run, or go on with it by resume=RUN"
            )
        options, overrides = [], []  # wherever they stand: argparse takes overrides in one place
        for previous, word in zip(["", *words], words, strict=False):
            if word.startswith("-") or previous in TAKE_VALUES:
                options.append(word)
            else:
                overrides.append(_in_quotes(word))
        sys.argv[1:] = [*options, *overrides]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing
        before = HydraConfig.instance().cfg  # `--help` leaves its own
        app = hydra.main(config_path=str(CONFIGS), config_name=config_name, version_base="1.3")
        try:
            app(job)()
        except (HydraException, OmegaConfBaseException, ValueError, RuntimeError) as error:
            if is_composed:
                raise
            leave_sweep()
            raise UserError(_sentence(error, sys.argv[1:])) from error
        finally:
            HydraConfig.instance().cfg = before
        return max(statuses, default=0)

    return guarded(start)


def compose_overrides(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The config that these overrides choose, beside the one of a Hydra app or without any."""
    is_app = GlobalHydra.instance().is_initialized()
    conf = None if is_app else hydra.initialize_config_dir(str(CONFIGS), version_base="1.3")
    with conf or nullcontext():
        return hydra.compose(config_name, overrides=list(overrides))


@contextmanager
def _as_before() -> Iterator[None]:
    """Undo what Lightning leaves of a run's processes, for the next run of a sweep."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_initialized() and "LOCAL_RANK" not in before:
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


# ---- values with any letters ----


def _in_quotes(word: str) -> str:
    """A word as Hydra's grammar takes it: in quotes if need be, and `~` as the home folder."""
    key, equals, value = word.partition("=")
    if not equals:
        return word
    if not key or _parse(f"{key}=") is None:
        raise UserError(f"{word}: write key=value")
    value = ",".join(map(os.path.expanduser, value.split(",")))
    if (parsed := _parse(f"{key}={value}")) is not None:
        is_stripped = isinstance(parsed.value(), str) and parsed.value() == value.strip() != value
        return f"{key}={quoted(value) if is_stripped else value}"
    if value[0] + value[-1] in ("[]", "{}"):
        ways = [f"{typed(key, value)} for one text"]
        if value[0] == "[" and "[" not in value[1:]:
            items = ",".join(map(quoted, value[1:-1].split(",")))
            ways.insert(0, shlex.quote(f"{key}=[{items}]") + " for a list")
        raise UserError(f"{word} needs more quotes: {' or '.join(ways)}")
    return f"{key}={','.join(map(quoted, value.split(',')))}"


def _parse(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except HydraException:
        return None


# ---- mistakes in one sentence ----


def _check_sources() -> None:
    """Refuse a file of an added folder in whose place Hydra reads that of another."""
    sources = HydraConfig.get().runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    for number, folder in enumerate(folders):
        for file in sorted(folder.rglob("*.yaml")) if number else ():
            first = folders[0] / file.relative_to(folder)
            if first.is_file() and first.read_bytes() != file.read_bytes():
                raise UserError(f"{file} is never read: {first} comes first; name it otherwise")


def _check_sections(cfg: DictConfig, config_name: str) -> None:
    """Refuse a section or value that an own file adds beside ours: as a rule a misspelt one.

    Raises:
        UserError: naming it; what another value refers to may be there.
    """
    known, written = _keys_of(config_name), OmegaConf.to_yaml(cfg)
    for group in HydraConfig.get().runtime.choices:  # `schedule@stage` is in the section `stage`
        known.add(group.rpartition("@")[2].partition(".")[0])
    for key in map(str, cfg):
        if key not in known and not re.search(rf"\$\{{{re.escape(key)}[.}}\[]", written):
            raise UserError(f"unknown key {key}{nearest(key, known) or ', which nothing reads'}")


def _keys_of(config_name: str) -> set[str]:
    """Keys of one of our configs, and of those that it is made of."""
    own: Any = OmegaConf.load(CONFIGS / f"{config_name}.yaml")
    parts = [name for name in own.defaults if isinstance(name, str) and name != "_self_"]
    return set(own).union(*map(_keys_of, parts))


def _sentence(error: Exception, words: Sequence[str]) -> str:
    """What is wrong with the words that Hydra refused, with the nearest existing name."""
    message = str(error) or str(error.__cause__)
    for word in words:
        parsed = _parse(word)
        if message.startswith(("Ambiguous", "Sweep")) and parsed and parsed.is_sweep_override():
            key, _, value = word.partition("=")
            one = typed(key, value)
            return f"{word} has several values, which -m runs one by one; one is written {one}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = list(error.options)
        kind, plugin = group.removeprefix("hydra/"), name.partition("_")[0]
        if plugin in PLUGINS.get(kind, ()):
            return f"{group}={name} needs a package: pip install hydra-{plugin}-{kind}"
        return f"{group}={name} does not exist{nearest(name, known)}; there are " + ", ".join(known)
    cause: Any = error.__cause__
    node, refused = getattr(cause, "parent_node", None), re.search("'([^']+)'", message)
    if message.startswith("Could not override") and refused:
        name = refused[1]
        known = re.findall(r"\w+@[\w.]+", message.partition("\n")[2].partition("\n")[0])
        if isinstance(node, DictConfig):
            parent = str(cause.full_key).rpartition(".")[0]
            known = [key for key, _ in walk(OmegaConf.to_container(node), parent)]
        is_open = name.startswith(("trainer.", "callbacks.", "logger.", "benchmark.table."))
        more = f"; +{name}=... adds it" if is_open else ""
        return f"unknown key {name}{nearest(name, known)}{more}"
    if message.startswith("Could not append") and refused:
        return f"{refused[1]} is there already; write it without +"
    if "missing EQUAL" in message and refused:
        return f"{refused[1]}: write key=value"
    return first_line(ValueError(message)).rpartition("resolving interpolation: ")[2]
