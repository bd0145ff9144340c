"""Read what earlier runs saved: a config to resume, or settings for the model of `init_from`.

Pixels, lengths, type and learning rates belong to the model that is loaded, not to whichever model
is the default. A run has them in its config.yaml, an exported folder in its cocoa.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from transformers import PretrainedConfig

from cocoa_pl.attention.policy import with_current_names
from cocoa_pl.errors import UserError, first_line
from cocoa_pl.evaluation.results import read_config
from cocoa_pl.models.adapters import base_path
from cocoa_pl.models.exported import DESCRIPTION
from cocoa_pl.models.loading import ADAPTER_CONFIG, find_folder
from cocoa_pl.models.published import KNOWN, find_config

log = logging.getLogger(__name__)

RESUMABLE = ("trainer.", "logger", "num_workers", "checkpoint_every", "evaluate", "init_from")
OPTION = "of_init_from"  # what such settings are called as options of `model` and `schedule`


def resumed_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of the run to resume, with the few keys that may change.

    Raises:
        UserError: if there is no such run, or a key is given that would make it another run.
    """
    if not (Path(cfg.resume) / "config.yaml").is_file():
        raise UserError(f"resume={cfg.resume}: there is no run (no config.yaml) in that folder")
    resumed = load_config(Path(cfg.resume))
    changed = [o for o in overrides if not o.startswith("resume=")]
    if wrong := [o for o in changed if not o.startswith(RESUMABLE)]:
        raise UserError(f"a resumed run keeps its config; {wrong[0]} cannot be changed")
    for override in changed:
        key = override.split("=", 1)[0]
        OmegaConf.update(resumed, key, OmegaConf.select(cfg, key))
    with open_dict(resumed):
        resumed.resume = cfg.resume
    return resumed


def load_config(run_dir: Path) -> DictConfig:
    """The config.yaml that `save_config` wrote.

    Raises:
        UserError: if it is damaged.
    """
    config = read_config(run_dir)
    for stage in config.get("stage", {}).values():
        if isinstance(stage, dict) and "policy" in stage:
            stage["policy"] = with_current_names(stage["policy"])
    return OmegaConf.create(config)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's plain config, what an exported model keeps: not where its weights came from."""
    model = {key: value for key, value in config["model"].items() if key != "source"}
    return {"model": model, "schedule": config["schedule"]}


def settled(cfg: DictConfig, config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The config with the settings of the model that `init_from` names, under all that the user and
    the experiment set; as it is where they chose a model.

    To be called where Hydra composes.

    Args:
        overrides: that made the config.

    Raises:
        UserError: for a model whose settings are unknown, or does not fit the one chosen.
    """
    if "init_from" not in cfg or cfg.init_from is None or cfg.resume is not None:
        return cfg
    loader: Any = GlobalHydra.instance().config_loader()
    chosen = loader.compute_defaults_list(config_name, list(overrides), RunMode.RUN).overrides
    if name := chosen.override_choices.get("model"):
        _check_fits(cfg, name)
        log.info("pixels, lengths and rates are those of model=%s", name)
        return cfg
    settings = _settings(cfg.init_from)
    if settings is None:
        raise UserError(
            f"init_from={cfg.init_from} does not tell which pixels, lengths and learning rates go "
            f"with it; add {_fitting(cfg)}"
        )
    found, where = settings
    options = ConfigStore.instance()
    for group, node in found.items():
        options.store(group=group, name=OPTION, node=node)
    try:
        settled = compose(config_name, overrides=[f"model={OPTION}", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{first_line(error)}; settings are those of {where}") from error
    finally:
        for group in found:
            del options.repo[group][f"{OPTION}.yaml"]
    log.info("pixels, lengths and rates are those of %s", where)
    return settled


def _settings(init_from: str) -> tuple[dict[str, Any], str] | None:
    """Options of `model` and `schedule`, and where they are from; None if the model has none."""
    run = Path(init_from)
    config = run / "config.yaml"
    if (run / "model").is_dir() and config.is_file():
        saved = load_config(run)
        return {"model": saved.model, "schedule": saved.schedule}, str(config)
    described = _file_of(init_from, DESCRIPTION)
    known = json.loads(described.read_text()).get("settings") if described else None
    if known is None:
        return None
    source = {"_target_": "cocoa_pl.models.loading.PretrainedSource", "path": init_from}
    return {**known, "model": {**known["model"], "source": source}}, str(described)


def _file_of(init_from: str, name: str) -> Path | None:
    """A small file of a model, here or on the hub, without its weights; None if it has none."""
    here = Path(init_from) / "model"
    if Path(init_from).exists() or init_from.count("/") != 1:
        file = find_folder(str(here if here.is_dir() else init_from)) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(init_from, name))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def _architecture(cfg: DictConfig) -> PretrainedConfig:
    """Of the model that `init_from` names, or of the base of that adapter."""
    if adapter := _file_of(cfg.init_from, ADAPTER_CONFIG):
        return find_config(base_path(adapter.parent, copy=cfg.model.source.get("path")))
    config = _file_of(cfg.init_from, "config.json")
    return find_config(str(config.parent) if config else cfg.init_from)


def _fitting(cfg: DictConfig) -> str:
    """Options of `model` for this architecture: of its own size, or else of its family."""
    architecture = _architecture(cfg)
    search = GlobalHydra.instance().config_loader().get_search_path().get_path()
    folders = [Path(str(place.path).removeprefix("file://")) / "model" for place in search]
    of_family, of_size = [], []
    for file in sorted(file for folder in folders for file in folder.glob("*.yaml")):
        option: Any = OmegaConf.load(file)
        source = option.get("source") or {}
        known = KNOWN.get(str(source.get("path")))
        if known is not None and _size(known.config()) == _size(architecture):
            of_size.append(file.stem)
        if _family(source) == architecture.model_type:
            of_family.append(file.stem)
    return " or ".join(f"model={name}" for name in of_size or of_family)


def _check_fits(cfg: DictConfig, name: str) -> None:
    """Settings are for a family; those of small models, with rates for random weights, for these
    alone.
    """
    architecture, source = _architecture(cfg), cfg.model.source
    is_published = any(_size(known.config()) == _size(architecture) for known in KNOWN.values())
    is_small = "family" in source
    if _family(source) in (None, architecture.model_type) and not (is_small and is_published):
        return
    known = _settings(cfg.init_from) is not None
    advice = "leave it out" if known else f"add {_fitting(cfg)}"
    raise UserError(
        f"model={name} does not fit init_from={cfg.init_from}, a {architecture.model_type} of "
        f"width {architecture.get_text_config().hidden_size}; {advice}"
    )


def _family(source: Any) -> str | None:
    """Of the models that an option of `model` is for; None if that is not to be found out here."""
    if "family" in source:
        return str(source["family"])
    try:
        return str(find_config(source["path"]).model_type)
    except (UserError, KeyError):
        return None


def _size(config: PretrainedConfig) -> tuple[str, int, int]:
    text = config.get_text_config()
    return config.model_type, text.hidden_size, text.num_hidden_layers
