"""What trains in a backbone: all of it, or adapters of peft; and adapters that others published.

Loaders that ignore names they do not know drop a published adapter without a word. Here one weight
that is missing or left over stops the loading.
"""

import copy
import dataclasses
import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import peft
from peft.tuners.lora import LoraLayer
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from cocoa_pl.config.bounds import Count, Names, ShareBelowOne
from cocoa_pl.errors import UserError, first_line
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.dora import make_lean
from cocoa_pl.models.loading import ADAPTER_CONFIG, Loaded

log = logging.getLogger(__name__)

# Of weights in a file of peft, since transformers 4.52.
_CURRENT_NAMES = r"base_model\.model\.(model\.(language_model|visual)|lm_head)\."
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


class FullTuning:
    """Every parameter of the backbone trains, in float32 whatever the model computes in.

    In bfloat16 an update of less than 1/256 of a weight would round away.
    """

    def __call__(self, backbone: Backbone) -> Backbone:
        return backbone.float().requires_grad_(True)


class LowRank:
    """LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353) through peft, adapters in float32.

    In bfloat16 most updates at the paper's learning rate would round away (`A` is about 1/r, its
    spacing 1e-3).

    Args:
        init: of `A`, as peft's `init_lora_weights`; ways that change the base are left out.
        target_modules: regular expressions over full module names, of the language model and the
            vision tower.
        use_dora: DoRA instead of LoRA.
        lean_dora: DoRA's norms once per optimizer step and without an identity matrix; the same
            outputs to rounding. Without DoRA it changes nothing.
        dropout_on_base: DoRA's dropout also in its (m / norm - 1) W x, as peft does it; False needs
            `lean_dora` and saves a second product with W.

    Raises:
        UserError: for an expression that is none or matches nothing in the model, or for
            `dropout_on_base` off without `lean_dora`.
    """

    def __init__(
        self,
        *,
        rank: Count,
        alpha: Count,
        dropout: ShareBelowOne,
        init: Literal[True, False, "gaussian", "orthogonal"],
        use_dora: bool,
        target_modules: Names,
        lean_dora: bool,
        dropout_on_base: bool,
    ) -> None:
        if not (lean_dora or dropout_on_base):
            raise UserError("adapter.dropout_on_base=false needs adapter.lean_dora=true")
        self.lean_dora = lean_dora
        self.dropout_on_base = dropout_on_base
        self.target_modules = tuple(target_modules)
        for expression in target_modules:
            try:
                re.compile(expression)
            except re.error as error:
                raise UserError(
                    f"adapter.target_modules: {expression!r} is no regular expression: {error}"
                ) from error
        self.config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            init_lora_weights=init,
            use_dora=use_dora,
            target_modules="|".join(f"(?:{expression})" for expression in target_modules),
        )

    def __call__(self, backbone: Backbone) -> Backbone:
        names = [name for name, _ in backbone.model.named_modules()]
        for expression in self.target_modules:
            if not any(re.fullmatch(expression, name) for name in names):
                raise UserError(
                    f"adapter.target_modules: {expression!r} matches no module of the model"
                )
        try:
            backbone.model = peft.get_peft_model(backbone.model, self.config)
        except ValueError as error:
            raise UserError(f"adapter: {first_line(error)}") from error
        if self.lean_dora:
            make_lean(backbone.model, dropout_on_base=self.dropout_on_base)
        # Autocast rounds what enters a product: a float32 copy first changes nothing. peft's own
        # DoRA takes its norms in the type of the input.
        if self.lean_dora or not self.config.use_dora:
            for module in backbone.modules():
                if isinstance(module, LoraLayer):
                    module.cast_input_dtype_enabled = False
        return backbone


def merged(backbone: Backbone) -> Backbone:
    """The backbone as a plain model: adapters folded into a copy of the weights, or itself where
    there are none.
    """
    if not isinstance(backbone.model, peft.PeftModel):
        return backbone
    plain = copy.deepcopy(backbone)
    copied: Any = plain.model
    plain.model = copied.merge_and_unload()
    return plain


def check_trained(state: Mapping[str, Tensor], *, where: Path | str) -> None:
    """Tell adapters that never trained from those of a part that the data never used, such as the
    vision tower on texts alone.

    Raises:
        UserError: if every LoRA `B`, which is zero at first, is zero still.
    """
    matrices = {name: value for name, value in state.items() if ".lora_B." in name}
    untouched = sorted(name for name, value in matrices.items() if not value.any())
    if untouched and len(untouched) == len(matrices):
        raise UserError(f"{where} was never trained: all lora_B are zero, first {untouched[0]}")
    if untouched:
        log.warning(
            "%s: %d of %d lora_B are zero, first %s: no data ever used them",
            *(where, len(untouched), len(matrices), untouched[0]),
        )


def base_path(folder: Path, *, copy: str | None) -> str:
    """Where the model is that an adapter was trained on: a folder or a name on the hub.

    Args:
        copy: another place of it; it counts if it ends in the base's own name.

    Raises:
        UserError: if `adapter_config.json` cannot be read or does not name the base, or names a
            folder that is not here, or one of several revisions.
    """
    config = read_config(folder)
    base, revision = config.base_model_name_or_path, config.revision
    if not base:
        raise UserError(f"{folder / ADAPTER_CONFIG} does not name its base_model_name_or_path")
    name = _model_name(base)
    if copy is not None and _model_name(copy) == name:
        return copy
    is_path = base.startswith((".", "/", "~")) or "\\" in base or base.count("/") != 1
    if not Path(base).exists() and is_path:
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


def _model_name(path: str) -> str:
    """The model's own name in a hub id or a path on any system.

    The hub's cache holds `models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/<revision>`, ModelScope's
    `Qwen/Qwen2___5-VL-3B-Instruct`.
    """
    parts = PureWindowsPath(path).parts  # knows both kinds of slashes
    of_hub = [part.split("--", 2)[2] for part in parts if part.startswith("models--")]
    return (of_hub or parts)[-1].replace("___", ".")


def merge_adapter(loaded: Loaded, folder: Path) -> Loaded:
    """Fold a published adapter into the weights of its base, as VLM2Vec (arXiv 2410.05160) and
    CoCoA publish theirs; tokenizer and images are the base's.

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
    config, weights = read_config(folder), _read_weights(folder)
    check_trained(weights, where=folder)
    model: Any = loaded.backbone.model
    if not all(re.match(_CURRENT_NAMES, name) for name in weights):
        # By their names until transformers 4.51: modules are adapted and merged in place.
        inner = model.model
        layout = {"model": inner.language_model, "visual": inner.visual, "lm_head": model.lm_head}
        model = nn.ModuleDict(layout)
    config = dataclasses.replace(
        config,
        base_model_name_or_path=None,  # it may be a copy of it
        task_type=None,
        modules_to_save=None,
        init_lora_weights=True,
        inference_mode=False,
    )
    try:
        adapted: Any = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: {first_line(error)}") from error
    # peft drops weights that have no place, and leaves places without weights as they were made.
    try:
        loading: Any = set_peft_model_state_dict(adapted, weights)
    except RuntimeError as error:
        shapes = str(error).splitlines()[1].strip()  # the first that do not fit
        raise UserError(f"{folder}: {shapes} {loaded.folder} is its base") from error
    if missing := sorted(name for name in loading.missing_keys if ".lora_" in name):
        name = missing[0].replace(".default", "")
        raise UserError(f"{folder} misses {name}, which target_modules asks for")
    if extra := sorted(loading.unexpected_keys):
        raise UserError(f"{folder} holds {extra[0]}, which target_modules does not ask for")
    try:
        adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN
        raise UserError(f"{folder} cannot be merged: {error}") from error
    loaded.backbone.model.requires_grad_(True)  # as a model that was just loaded
    log.info("%s was merged into %s", folder, loaded.folder)
    return dataclasses.replace(loaded, folder=folder)


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
    """`adapter_model.safetensors`, or the `.bin` of older releases."""
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if not any((folder / name).is_file() for name in names):  # peft would ask the hub for them
        raise UserError(f"{folder} holds an adapter's config and neither {' nor '.join(names)}")
    try:
        found = load_peft_weights(str(folder), device="cpu")
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{folder}: its weights cannot be loaded: {first_line(error)}") from error
    if foreign := sorted(name for name in found if ".lora_" not in name):
        raise UserError(f"{folder}: {foreign[0]} belongs to no LoRA or DoRA layer")
    return found
