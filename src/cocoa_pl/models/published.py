"""True architectures of published models by name, without weights and without a network.

`published.yaml`, beside this file, holds the published configurations of the supported models.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, PretrainedConfig

from cocoa_pl.errors import UserError, first_line


@dataclass(frozen=True)
class Published:
    """A model as it lies on the hub.

    Attributes:
        fields: of its config.json; nested as in `text_config` and `vision_config`.
        parameters: in its weight files, tied embeddings counted once.
        num_tokens: of its tokenizer, special tokens included; embedding rows behind are reserved.
    """

    fields: Mapping[str, Any]
    parameters: int
    num_tokens: int

    def config(self) -> PretrainedConfig:
        """A new stock transformers configuration."""
        return AutoConfig.for_model(**copy.deepcopy(dict(self.fields)))


def _read() -> dict[str, Published]:
    table = yaml.safe_load((files("cocoa_pl.models") / "published.yaml").read_text("utf-8"))
    return {
        name: Published(entry["config"], entry["parameters"], entry["num_tokens"])
        for name, entry in table["models"].items()
    }


# By their names on the hub.
KNOWN: dict[str, Published] = _read()


def find_config(path: str) -> PretrainedConfig:
    """The configuration of a model whose weights need not be here.

    Looked for in this order: a local folder, the hub's cache on this disk, the published table.

    Raises:
        UserError: if none of them has it, or the folder's cannot be read.
    """
    local = Path(path) / "config.json"
    if local.is_file():
        try:
            return AutoConfig.from_pretrained(local)
        except (OSError, ValueError) as error:
            raise UserError(f"{local} cannot be read: {first_line(error)}") from error
    if not Path(path).exists():
        try:
            cached = try_to_load_from_cache(path, "config.json")
        except HFValidationError:  # a path, not a name on the hub
            cached = None
        if isinstance(cached, str):
            return AutoConfig.from_pretrained(cached)
        if path in KNOWN:
            return KNOWN[path].config()
    raise UserError(
        f"no config.json for {path}: it is no model folder, not in the hub's cache and not one of "
        f"{', '.join(KNOWN)}"
    )
