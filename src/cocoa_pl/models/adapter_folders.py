"""An adapter folder of peft in, a plain model with the adapter folded into its base out.

Such a folder holds `adapter_config.json` and `adapter_model.safetensors`, as VLM2Vec (arXiv
2410.05160) and CoCoA publish theirs. Which names its weights have depends on the transformers
release that wrote them:

    until 4.51                         since 4.52
    model.layers.0.self_attn.q_proj    model.language_model.layers.0.self_attn.q_proj
    visual.blocks.0.attn.qkv           model.visual.blocks.0.attn.qkv

Loaders that ignore names they do not know drop the adapter without a word. Here each weight is
placed by its own name, and one that is missing or left over stops the loading.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import check_trained
from cocoa_pl.models.loading import ADAPTER_CONFIG, Loaded, load

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"

# Module names as transformers wrote them until 4.51, and as the model has them.
_OLDER = (
    (r"visual\.", "model.visual."),
    (r"model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?"
)
# Fields of adapter_config.json that change nothing here or are obeyed; any other must say nothing.
_UNDERSTOOD = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "fan_in_fan_out", "use_rslora", "use_dora"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "runtime_config"),
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")  # leave the base as it is


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_path(folder: Path, *, copy: str | None) -> str:
    """Where the model is that an adapter was trained on: a folder or a name on the hub.

    Args:
        copy: a local copy of it, where there is one; it counts if it ends in the base's own name.

    Raises:
        UserError: if `adapter_config.json` cannot be read or does not name the base, or names a
            folder that is not here, or one of several revisions.
    """
    config = read_config(folder)
    base, revision = config.base_model_name_or_path, config.revision
    if not base:
        raise UserError(f"{folder / ADAPTER_CONFIG} does not name its base_model_name_or_path")
    name = Path(base).name
    if copy is not None and Path(copy).name == name:
        return copy
    if not Path(base).exists() and (base.startswith((".", "/", "~")) or base.count("/") != 1):
        raise UserError(
            f"{folder} is an adapter for {base}, which is not here; "
            f"pass a copy as model.source.path=/path/to/{name}"
        )
    if revision not in (None, "main") and not Path(base).exists():
        raise UserError(
            f"{folder} is an adapter for revision {revision} of {base}; fetch it, hf download "
            f"{base} --revision {revision} --local-dir {name}, and pass model.source.path={name}"
        )
    return str(base)


def load_adapter(
    folder: Path, *, base: Path, kernel: str, dtype: str, gradient_checkpointing: bool
) -> Loaded:
    """The base with the adapter folded into its weights; tokenizer and images as for the base.

    Args:
        base: a model folder.
        kernel, dtype, gradient_checkpointing: as for `load`.

    Raises:
        UserError: if a weight of the adapter has no place in the base or a place has no weight, if
            shapes differ, if it was never trained, if it is of a kind that is not LoRA or DoRA, or
            if the folder holds a whole model too.
    """
    if whole := sorted(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder} holds a model ({whole[0].name}) and an adapter ({ADAPTER_CONFIG}); remove "
            "the one that is not meant"
        )
    loaded = load(base, kernel=kernel, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    backbone = loaded.backbone
    backbone.model = merge(backbone.model, folder)
    log.info("%s was merged into %s", folder, base)
    return dataclasses.replace(loaded, folder=folder)


def merge(model: nn.Module, folder: Path) -> nn.Module:
    """The stock model itself, with an adapter folder added to its weights; see `load_adapter`."""
    config = read_config(folder)
    weights = _read_weights(folder)
    parts = _parts(weights, where=folder)
    _check_places(parts, config, model, where=folder)
    check_trained(weights, where=folder)
    adapted: Any = peft.get_peft_model(model, _exact(config, parts, weights))
    waiting = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    for module, keys in parts.items():
        for part, key in keys.items():
            parameter = waiting.pop(f"base_model.model.{_current(module)}.{part}.default.weight")
            if parameter.shape != weights[key].shape:
                raise UserError(
                    f"{folder}: {key} has the shape {tuple(weights[key].shape)}, not "
                    f"{tuple(parameter.shape)}; {config.base_model_name_or_path} is its base"
                )
            with torch.no_grad():
                parameter.copy_(weights[key])
    assert not waiting, f"peft adapts what the file does not name, first {min(waiting)}"
    try:
        plain: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN
        raise UserError(f"{folder} cannot be merged: {error}") from error
    return plain.requires_grad_(True)  # as a model that was just loaded


def read_config(folder: Path) -> peft.LoraConfig:
    """The folder's `adapter_config.json`.

    Raises:
        UserError: if it cannot be read or is not of LoRA or DoRA as they are understood here.
    """
    file = folder / ADAPTER_CONFIG
    try:
        described = json.loads(file.read_text())
        kind = described["peft_type"]
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read as an adapter's config: {error!r}") from error
    if not isinstance(config, peft.LoraConfig):
        raise UserError(f"{file}: {kind} adapters are not supported, only LoRA and DoRA")
    for name in sorted(set(described) - _UNDERSTOOD):
        if described[name] and described[name] != _DEFAULTS.get(name):
            raise UserError(
                f"{file}: {name}={described[name]} is not understood; "
                "merge the adapter with peft and pass the merged model"
            )
    if config.init_lora_weights not in _HARMLESS_INITS:
        raise UserError(
            f"{file}: init_lora_weights={config.init_lora_weights} changed the base's weights; "
            "merge the adapter with peft and pass the merged model"
        )
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be loaded: {error}") from error


def _parts(weights: Iterable[str], *, where: Path) -> dict[str, dict[str, str]]:
    """Keys of the file by module (as the file names it) and part of the adapter."""
    parts: dict[str, dict[str, str]] = {}
    for key in sorted(weights):
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{where}: {key} belongs to no LoRA or DoRA layer")
        parts.setdefault(match["module"], {})[match["part"]] = key
    if not parts:
        raise UserError(f"{where / WEIGHTS} is empty")
    return parts


def _current(module: str) -> str:
    """A module's name in the model, from its name in either layout."""
    for older, current in _OLDER:
        if re.match(older, module):
            return re.sub(older, current, module, count=1)
    return module


def _older(module: str) -> str:
    """A module's name in the older layout, from its name in the model."""
    name = re.sub(r"^model\.visual\.", "visual.", module)
    return re.sub(r"^model\.language_model\.", "model.", name)


def _check_places(
    parts: dict[str, dict[str, str]], config: peft.LoraConfig, model: nn.Module, *, where: Path
) -> None:
    """Every weight has one place, every place its weights."""
    needed = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if config.use_dora else [])}
    names = {name for name, _ in model.named_modules()}
    taken: dict[str, str] = {}
    for module, keys in parts.items():
        if _current(module) not in names:
            raise UserError(
                f"{where}: {next(iter(keys.values()))} has no place in the model; "
                f"its base is {config.base_model_name_or_path}"
            )
        if extra := set(keys) - needed:
            raise UserError(f"{where}: {keys[min(extra)]} is unexpected: use_dora is off")
        if missing := needed - set(keys):
            raise UserError(f"{where} misses base_model.model.{module}.{min(missing)}")
        other = taken.setdefault(_current(module), module)
        if other != module:
            raise UserError(f"{where} holds {module} and {other}, which are the same layer")
    # What the config says was adapted, in its own layout: a file cut short is not an adapter of
    # fewer layers.
    wanted = [{_current(n) for n in _targets(config, rename, names)} for rename in (str, _older)]
    if set(taken) not in wanted:
        least = min(wanted, key=lambda modules: len(modules ^ set(taken)))
        if missing := least - set(taken):
            raise UserError(f"{where} misses {min(missing)}, which target_modules asks for")
        extra = set(taken) - least
        raise UserError(f"{where} holds {min(extra)}, which target_modules does not ask for")


def _targets(
    config: peft.LoraConfig, rename: Callable[[str], str], names: Iterable[str]
) -> list[str]:
    """Modules that peft itself would adapt if they had the names of one layout."""
    if config.target_modules is None:
        return []
    return [n for n in map(rename, names) if check_target_module_exists(config, n)]


def _exact(
    config: peft.LoraConfig, parts: dict[str, dict[str, str]], weights: dict[str, Tensor]
) -> peft.LoraConfig:
    """The config that adapts exactly the modules of the file, each with its own rank and scale."""
    published: dict[str, int] = config.alpha_pattern or {}
    ranks, alphas = {}, {}
    for module, keys in parts.items():
        pattern = re.escape(_current(module))
        ranks[pattern] = weights[keys["lora_A"]].shape[0]
        alphas[pattern] = published.get(get_pattern_key(list(published), module), config.lora_alpha)
    return dataclasses.replace(
        config,
        base_model_name_or_path=None,  # it may be a copy of it
        target_modules=[_current(module) for module in parts],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        init_lora_weights=True,
        inference_mode=False,
    )
