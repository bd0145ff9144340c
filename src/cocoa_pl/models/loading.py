"""Models of a Hugging Face folder or hub id, with their tokenizers and image processors."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)

from cocoa_pl.attention import TEXT_ATTENTION
from cocoa_pl.errors import UserError, first_line, typed
from cocoa_pl.models.backbone import Backbone, NoVocabularyHead
from cocoa_pl.models.qwen_vl import Qwen2VLBackbone, Qwen3VLBackbone, Qwen25VLBackbone
from cocoa_pl.models.tiny import Texts

# One entry for each family, by the `model_type` in its config.json.
FAMILIES: dict[str, type[Backbone]] = {
    "qwen2_vl": Qwen2VLBackbone,
    "qwen2_5_vl": Qwen25VLBackbone,
    "qwen3_vl": Qwen3VLBackbone,
}

ADAPTER_CONFIG = "adapter_config.json"  # of a folder that holds an adapter (`adapters.py`)

# By their names on the hub: the published `config`, the `parameters` in the weight files, and the
# tokenizer's `num_tokens`.
KNOWN: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("published.yaml").read_text("utf-8")
)["models"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PretrainedSource:
    """A local folder, or a model on the Hugging Face hub (downloaded once into its cache)."""

    path: str

    def folder(self, texts: Texts) -> Path:
        return find_folder(self.path)

    def config(self) -> PretrainedConfig:
        """The architecture, without the weights and without a download."""
        return find_config(self.path)


@dataclass(frozen=True)
class Inputs:
    """What makes a model's input of texts and images, and how many rows its token embedding has,
    reserved ones included.
    """

    family: type[Backbone]
    tokenizer: Any
    image_processor: Any
    num_token_rows: int


@dataclass(frozen=True)
class Loaded(Inputs):
    """A model as it came from its folder."""

    backbone: Backbone
    folder: Path


def find_folder(path: str) -> Path:
    """The local folder of a model, or of an adapter; of a run, of the model that it exported.

    Raises:
        UserError: if it is neither on this disk nor to be had from the hub.
    """
    for folder in (Path(path), Path(path) / "model"):
        if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return folder
    if (Path(path) / "config.yaml").is_file():
        raise UserError(
            f"{path} is a run that has exported no model yet; {typed('resume', path)} finishes it"
        )
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{path} is no model folder: there is no config.json in it")
    try:
        return Path(snapshot_download(path))
    except HFValidationError as error:
        raise UserError(f"{path} is neither a model folder nor a name on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{path} is not on this disk and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}): download it elsewhere and pass the folder, "
            f"model.source.path=/path/to/{path.split('/')[1]}"
        ) from error


def find_config(path: str) -> PretrainedConfig:
    """The architecture of a model whose weights need not be here: of a local folder, of the hub's
    cache on this disk, or as it was published (`KNOWN`), in this order.

    Raises:
        UserError: if none of them has it, or the folder's cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        if (local := Path(path) / "config.json").is_file():
            raise UserError(f"{local} cannot be read: {first_line(error)}") from error
    if path in KNOWN:
        return published_config(path)
    raise UserError(
        f"no config.json for {path}: it is no model folder, not in the hub's cache and not one of "
        f"{', '.join(KNOWN)}"
    )


def published_config(name: str) -> PretrainedConfig:
    """A new stock configuration of a model in `KNOWN`."""
    return AutoConfig.for_model(**copy.deepcopy(KNOWN[name]["config"]))


def load(folder: Path, *, kernel: str, dtype: str, gradient_checkpointing: bool) -> Loaded:
    """Stock weights from a folder, wired to the project's attention.

    Args:
        dtype: a name in `DTYPES`.

    Raises:
        UserError: for a family that is not supported, a missing or broken file, weights or a
            tokenizer that do not fit the config, or an adapter lying in the same folder.
    """
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would add it, or another model's weights
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}); a model and an adapter go into folders "
            "of their own"
        )
    inputs = load_inputs(folder)
    with _naming(folder):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=TEXT_ATTENTION,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # not ignored: refused by name below
        )
    model, info = loaded
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    wrong = sorted([*info["missing_keys"], *info["unexpected_keys"], *mismatched])
    if wrong == ["lm_head.weight"] and info["missing_keys"]:
        model.set_output_embeddings(NoVocabularyHead())
    elif wrong:
        raise UserError(
            f"{folder}: weights do not fit the config, first {wrong[0]} of {len(wrong)}"
        )
    if gradient_checkpointing:
        save_memory(model)
    backbone = inputs.family(model, inputs.image_processor, kernel=kernel)
    return Loaded(**vars(inputs), backbone=backbone, folder=folder)


def save_memory(model: Any) -> None:
    """Compute the blocks' inner states again in the backward pass instead of keeping them."""
    older = model.gradient_checkpointing_enable  # its name in transformers 5.17
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    model.enable_input_require_grads()


def load_inputs(folder: Path) -> Inputs:
    """All of a model's folder but its weights.

    Raises:
        UserError: for a family that is not supported, a missing or broken file, or a tokenizer that
            does not fit the config.
    """
    with _naming(folder):
        config = AutoConfig.from_pretrained(folder)
    family = family_of(config, where=folder)
    with _naming(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = family.image_processor.from_pretrained(folder)
    # Without its files, transformers makes up an empty tokenizer.
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
        raise UserError(f"{folder}: the tokenizer is missing or does not fit the config")
    return Inputs(family, tokenizer, image_processor, config.get_text_config().vocab_size)


def family_of(config: Any, *, where: Path | str) -> type[Backbone]:
    """What wraps models of this configuration.

    Raises:
        UserError: for a family that is not supported.
    """
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{where} is a {config.model_type} model; supported are {known}")
    return FAMILIES[config.model_type]


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Say of missing and broken files of a model in one sentence which folder they are in, instead
    of what transformers says of its weights in many lines.
    """

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(is_error)
    try:
        yield
    except (OSError, ValueError, SafetensorError, ImportError, RuntimeError) as error:
        # The last two of a quantized base, without its package or a GPU.
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from error
    finally:
        log.removeFilter(is_error)
