"""A path in, the exported folder there and what its `cocoa.json` says out: what vectors depend on
beside the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import ADAPTER_CONFIG, find_folder

DESCRIPTION = "cocoa.json"
FORMAT = 1  # of cocoa.json
NEEDED = (
    "policy",
    "eos_token_id",
    "max_length",
    "min_pixels",
    "max_pixels",
    "dtype",
    "fingerprint",
)


def export_folder(path: str) -> Path:
    """The exported folder that a run folder holds, or that the path or hub id is itself.

    Raises:
        UserError: if it is none of these.
    """
    inner = Path(path) / "model"
    folder = find_folder(str(inner if (inner / DESCRIPTION).is_file() else path))
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} is an adapter, which says nothing of attention and pooling; make a model of "
            f"it first: python train.py init_from={folder} stage=... exports one"
        )
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no {DESCRIPTION}: it was not exported by cocoa_pl")
    return folder


def read_description(folder: Path) -> dict[str, Any]:
    """What `cocoa.json` says.

    Raises:
        UserError: if it is not JSON, of another format, or lacks something.
    """
    path = folder / DESCRIPTION
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(described, dict) or "format" not in described:
        raise UserError(f"{path} does not describe a model exported by cocoa_pl")
    if described["format"] != FORMAT:
        raise UserError(f"{path}: format {described['format']} is not {FORMAT}; update cocoa_pl")
    if missing := [name for name in NEEDED if name not in described]:
        raise UserError(f"{path} lacks {', '.join(missing)}; export the model again")
    return described
