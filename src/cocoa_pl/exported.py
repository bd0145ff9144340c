"""A path in, the exported folder there and what its `cocoa.json` says out: what vectors depend on
beside the weights, and digests of all files that were exported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cocoa_pl.errors import UserError
from cocoa_pl.fingerprint import digest_of_file, digest_of_text
from cocoa_pl.models.loading import ADAPTER_CONFIG, find_folder

DESCRIPTION = "cocoa.json"
FORMAT = 2  # of cocoa.json; 1 knew no digests
UNREAD = ("generation_config.json",)  # exported for other tools; vectors do not depend on it
CHANGED, MISSING = "was changed since the model was exported", "is missing"


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


def write_description(folder: Path, described: Mapping[str, Any]) -> None:
    """Write `cocoa.json`, with digests of what the folder holds and of what is described.

    Vectors depend on the `files` that are there when a folder is described for the first time;
    `others`, added later, are known to be written by an export, and that is all.
    """
    found = {name: digest_of_file(folder / name) for name in files_of(folder)}
    needed = described.get("files", found.keys() - UNREAD)
    content = {
        **described,
        "files": {name: digest for name, digest in found.items() if name in needed},
        "others": {name: digest for name, digest in found.items() if name not in needed},
    }
    content["digest"] = _digest(content)
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1))


def read_description(folder: Path) -> dict[str, Any]:
    """What `cocoa.json` says of a folder in which nothing was changed since the export.

    Raises:
        UserError: if it cannot be read, is of another format, or anything was changed.
    """
    described = described_in(folder)
    path = folder / DESCRIPTION
    if described["format"] == 1:
        raise UserError(
            f"{path} is of format 1, which knows no digests of the model's files: export it again, "
            "python train.py resume=RUN evaluate=false"
        )
    if described["format"] != FORMAT:
        raise UserError(f"{path}: format {described['format']} is not {FORMAT}; update cocoa_pl")
    for name, what in differences(folder, described):
        if name not in described["others"]:
            raise UserError(f"{folder / name} {what}; export the model again")
    return described


def differences(folder: Path, described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of files that are not as they were exported, and `CHANGED` or `MISSING`; of a changed
    `cocoa.json` nothing else can be told.
    """
    if described.get("digest") != _digest(described):
        yield DESCRIPTION, CHANGED
        return
    for name, digest in {**described["files"], **described["others"]}.items():
        if not (folder / name).is_file():
            yield name, MISSING
        elif digest_of_file(folder / name) != digest:
            yield name, CHANGED


def described_in(folder: Path) -> dict[str, Any]:
    """The content of `cocoa.json` in any format, unchecked; empty for a folder without one.

    Raises:
        UserError: if it is damaged.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        described: dict[str, Any] = json.loads(path.read_text())
        described["format"], described["lineage"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a model exported by cocoa_pl") from error
    return described


def files_of(folder: Path) -> list[str]:
    """Paths of all files relative to the folder, but for `cocoa.json`."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != DESCRIPTION)


def _digest(described: Mapping[str, Any]) -> str:
    content = {name: value for name, value in described.items() if name != "digest"}
    as_read = json.loads(json.dumps(content))
    return digest_of_text(json.dumps(as_read, sort_keys=True))
