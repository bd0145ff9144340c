"""Read what earlier runs saved: a config to resume, or settings for the model of `init_from`.

Pixels, lengths, type and learning rates belong to the model that is loaded, not to the default
model. An exported folder, also that of a run, has them in its cocoa.json.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

from cocoa_pl.attention.policy import with_current_names
from cocoa_pl.config.build import check_values
from cocoa_pl.config.folders import run_of
from cocoa_pl.errors import UserError, first_line, typed
from cocoa_pl.evaluation.results import read_config
from cocoa_pl.models.adapters import base_path
from cocoa_pl.models.exported import DESCRIPTION, described_in
from cocoa_pl.models.loading import (
    ADAPTER_CONFIG,
    KNOWN,
    find_config,
    find_folder,
    published_config,
)

log = logging.getLogger(__name__)

# What may change of a resumed run: of `trainer` single keys, of the groups another option too.
RESUMABLE = {
    *("trainer", "callbacks", "logger", "export", "num_workers", "checkpoint_every"),
    *("evaluate", "init_from"),
}
DEFAULT_MODEL = "tiny"  # of conf/train.yaml
OPTION = "of_init_from"  # the name of such settings as an option of `model` and of `schedule`
SCHEDULE = Path(__file__).parents[1] / "conf" / "schedule" / "paper.yaml"


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of the run to resume, with the few keys that may change.

    Raises:
        UserError: if there is no such run, or a key is given that would make it another run.
    """
    run_dir = run_of(cfg.resume)
    resumed = load_config(run_dir)
    if "schedule" in resumed:
        raise UserError(
            f"resume={cfg.resume}: an earlier version of cocoa_pl made this run, and its config "
            f"has another form; {typed('init_from', cfg.resume)} begins a new run with its model"
        )
    for word in overrides:
        key = word.partition("=")[0].lstrip("+")
        if key.partition(".")[0] not in RESUMABLE | {"resume"} or key == "trainer":
            raise UserError(f"a resumed run keeps its config; {word} cannot be changed")
        OmegaConf.update(resumed, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    resumed.resume = str(run_dir)
    check_values(resumed)
    return resumed


def load_config(run_dir: Path) -> DictConfig:
    """The config.yaml that a run wrote.

    Raises:
        UserError: if it is damaged.
    """
    config = read_config(run_dir)
    saved = OmegaConf.create(config)
    for key in ("model", "model.source", "stage", "data", "adapter"):
        if key.partition(".")[0] in config and not OmegaConf.is_dict(OmegaConf.select(saved, key)):
            raise UserError(f"{run_dir / 'config.yaml'} is damaged: {key} must be a section")
    if "stage" in config and not config["stage"].get("order"):
        raise UserError(f"{run_dir / 'config.yaml'} is damaged: stage.order names no stage")
    for stage in config.get("stage", {}).values():
        if isinstance(stage, dict) and "policy" in stage:
            stage["policy"] = with_current_names(stage["policy"])
    return OmegaConf.create(config)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's plain config, what an exported model keeps: the model section without the place
    of the weights, and of the stages what a schedule sets.
    """
    model = {key: value for key, value in config["model"].items() if key != "source"}
    shape: Any = OmegaConf.to_container(OmegaConf.load(SCHEDULE))
    return {"model": model, "stage": _shaped(config["stage"], shape)}


def _shaped(values: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """The values whose keys another mapping has, at every depth."""
    return {
        key: _shaped(values[key], inner) if isinstance(inner, dict) else values[key]
        for key, inner in shape.items()
        if key in values
    }


def settled(cfg: DictConfig) -> DictConfig:
    """The config with the settings of the model that `init_from` names, under all that the user and
    the experiment set; as it is where they chose a model.

    To be called where Hydra composes and `HydraConfig` is that of the config.

    Raises:
        UserError: for a model whose settings are unknown, or does not fit the one chosen.
    """
    if "init_from" not in cfg or cfg.init_from is None or cfg.resume is not None:
        return cfg
    job = HydraConfig.get()
    words, name = list(job.overrides.task), job.runtime.choices["model"]
    if name != DEFAULT_MODEL or any(word.lstrip("+").startswith("model=") for word in words):
        architecture = _architecture(cfg)
        if not _fits(cfg.model.source, architecture):
            raise UserError(
                f"model={name} does not fit init_from={cfg.init_from}, a {architecture.model_type} "
                f"of width {architecture.get_text_config().hidden_size}; "
                + ("leave it out" if _settings(cfg.init_from) else f"add {_fitting(architecture)}")
            )
        log.info("pixels, lengths and rates are those of model=%s", name)
        return cfg
    found = _settings(cfg.init_from)
    if found is None:
        raise UserError(
            f"init_from={cfg.init_from} does not tell which pixels, lengths and learning rates go "
            f"with it; add {_fitting(_architecture(cfg))}"
        )
    settings, where = found
    defaults = [{"override /schedule@_global_.schedule": OPTION}, "_self_"]
    options = ConfigStore.instance()
    options.store(group="model", name=OPTION, node={"defaults": defaults, **settings["model"]})
    options.store(group="schedule", name=OPTION, node=settings["stage"], package="stage")
    search = [word for word in job.overrides.hydra if word.startswith("hydra.searchpath=")]
    try:
        settled = compose(job.job.config_name, [f"model={OPTION}", *words, *search])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{first_line(error)}; settings are those of {where}") from error
    finally:
        for group in ("model", "schedule"):
            del options.repo[group][f"{OPTION}.yaml"]
    check_values(settled)
    log.info("pixels, lengths and rates are those of %s", where)
    return settled


def _settings(init_from: str) -> tuple[dict[str, Any], str] | None:
    """The settings of a model and where they are from; None without those of this version."""
    described = _file_of(init_from, DESCRIPTION)
    known = described_in(described.parent).get("settings") if described else None
    if not known or not known.keys() >= {"model", "stage"}:
        return None
    place = {"_target_": "cocoa_pl.models.loading.PretrainedSource", "path": init_from}
    source = OmegaConf.select(load_config(Path(init_from)), "model.source", default=place)
    return {**known, "model": {**known["model"], "source": source}}, str(described)


def _file_of(init_from: str, name: str) -> Path | None:
    """A small file of a model, here or on the hub, without its weights; None if it has none."""
    is_here = Path(init_from).exists() or init_from.count("/") != 1
    try:
        file = cached_file(find_folder(init_from) if is_here else init_from, name)
    except OSError:
        return None
    return Path(file) if file else None


def _architecture(cfg: DictConfig) -> PretrainedConfig:
    """Of the model that `init_from` names, or of the base of that adapter."""
    if adapter := _file_of(cfg.init_from, ADAPTER_CONFIG):
        return find_config(base_path(adapter.parent, copy=cfg.model.source.get("path")))
    config = _file_of(cfg.init_from, "config.json")
    return find_config(str(config.parent) if config else cfg.init_from)


def _fitting(architecture: PretrainedConfig) -> str:
    """The options of `model` for an architecture, as words."""
    places = [one for one in HydraConfig.get().runtime.config_sources if one.schema == "file"]
    fitting = []
    for file in (file for one in places for file in sorted(Path(one.path, "model").glob("*.yaml"))):
        option: Any = OmegaConf.load(file)
        if "source" in option and _fits(option.source, architecture):
            fitting.append(f"model={file.stem}")
    return " or ".join(fitting)


def _fits(source: DictConfig, architecture: PretrainedConfig) -> bool:
    """Whether the `model` section with this source is for an architecture: settings are for a
    family; those of small models, with rates for random weights, for none that is published.
    """
    if "family" in source:
        widths = {published_config(name).get_text_config().hidden_size for name in KNOWN}
        width = architecture.get_text_config().hidden_size
        return source.family == architecture.model_type and width not in widths
    try:
        return find_config(source["path"]).model_type == architecture.model_type
    except (UserError, KeyError):
        return True  # only its owner can tell
