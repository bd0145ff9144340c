"""What proves that an exported folder still gives the vectors it was exported with.

`cocoa.json` says what vectors depend on beside the weights, with digests of all files: they tell
exactly whether files and weights are the same. The fingerprint, vectors of fixed inputs, tells what
digests cannot: whether other versions of libraries, or other kernels, still make the same vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.config.bounds import Count, NotNegative, check_value
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.errors import UserError, typed
from cocoa_pl.models.loading import ADAPTER_CONFIG, find_folder

Encode = Callable[[Sequence[Item]], NDArray[np.float32]]

# Largest difference of a vector component: other kernels and thread counts round differently, other
# weights differ more. Between a CPU and a GPU too: float32 is not TF32 there unless asked for.
FINGERPRINT_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}

DESCRIPTION = "cocoa.json"
FORMAT = 2  # of cocoa.json
UNREAD = ("generation_config.json",)  # exported for other tools; vectors do not depend on it
# What is read of it, beside the fingerprint.
STAGE = {"stage": str, "steps": Count, "batch_size": Count, "lr": float, "policy": str, "seed": int}
READ: dict[str, Any] = {
    "lineage": Sequence[Mapping[str, Any]],
    "settings": Mapping[str, Mapping[str, Any]] | None,
    "policy": Mapping[str, Any],
    **dict.fromkeys(("max_length", "min_pixels", "max_pixels"), Count),
    "dtype": Literal["float32", "bfloat16"],
    "rounding": NotNegative,
    **dict.fromkeys(("files", "others"), Mapping[str, str]),
}
CHANGED, MISSING = "was changed since the model was exported", "is missing"


def export_folder(path: str) -> Path:
    """The exported folder that a run folder holds, or that the path or hub id is itself.

    Raises:
        UserError: if it is none of these.
    """
    folder = find_folder(path)
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} is an adapter, which says nothing of attention and pooling; make a model of "
            f"it first: python train.py {typed('init_from', folder)} stage=... exports one"
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
    for name, what in differences(folder, described):
        if name not in described["others"]:
            raise UserError(f"{folder / name} {what}; export the model again")
    return described


def differences(folder: Path, described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of files that are not as they were exported, and `CHANGED` or `MISSING`."""
    for name, digest in {**described["files"], **described["others"]}.items():
        if not (folder / name).is_file():
            yield name, MISSING
        elif digest_of_file(folder / name) != digest:
            yield name, CHANGED


def described_in(folder: Path) -> dict[str, Any]:
    """The content of `cocoa.json`; empty for a folder without one.

    Raises:
        UserError: if it is damaged, was edited, or is of another format.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        described: dict[str, Any] = json.loads(path.read_bytes())
        number = described["format"]
        is_as_written = number != FORMAT or described["digest"] == _digest(described)
        if number == FORMAT and is_as_written:
            for key, kind in READ.items():
                check_value(key, described[key], kind)
            for stage, key in product(described["lineage"], STAGE):
                check_value(key, stage[key], STAGE[key])
            check_value("causal", Policy.from_dict(described["policy"]).causal, bool)
            np.array(described["fingerprint"], np.float32)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} describes no model; export it again") from error
    if number != FORMAT:
        raise UserError(
            f"{path}: format {number} is not {FORMAT}; update cocoa_pl, or remove the folder and "
            "export the model again"
        )
    if not is_as_written:
        raise UserError(
            f"{path} {CHANGED}; put back what it was, move it elsewhere, or export the model again"
        )
    return described


def files_of(folder: Path) -> list[str]:
    """Paths of all files relative to the folder, but for `cocoa.json`."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != DESCRIPTION)


def _digest(described: Mapping[str, Any]) -> str:
    content = {name: value for name, value in described.items() if name != "digest"}
    as_read = json.loads(json.dumps(content))
    return digest_of_text(json.dumps(as_read, sort_keys=True))


def take_fingerprint(encode: Encode) -> NDArray[np.float32]:
    """Vectors of a text, an image, and both: (3, D)."""
    ramp = np.linspace(0, 255, 56, dtype=np.uint8)
    pixels = np.stack([*np.meshgrid(ramp, ramp), np.full((56, 56), 128, np.uint8)], axis=2)
    image = Image.fromarray(pixels)
    return encode(
        [
            Item("a seven at the top left"),
            Item(IMAGE_SLOT, (image,)),
            Item(f"{IMAGE_SLOT}what is in this picture?", (image,)),
        ]
    )


def check_fingerprint(
    encode: Encode, expected: NDArray[np.float32], *, dtype: str, where: str
) -> None:
    """Compare with the vectors taken at export.

    Raises:
        UserError: if one differs: what computes them is not what computed them at export.
    """
    taken = take_fingerprint(encode)
    worst = np.inf if taken.shape != expected.shape else float(np.abs(taken - expected).max())
    if not worst <= FINGERPRINT_TOLERANCE[dtype]:
        raise UserError(
            f"{where}: the model does not give the vectors it was exported with (largest "
            f"difference {worst:.2g}), and its files are the same: another version of torch or "
            "transformers reads it otherwise"
        )


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and every bit of these tensors; the same on any device."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content.data)
    return digest.hexdigest()


def digest_of_text(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def digest_of_file(path: Path) -> str:
    """Of every byte; some gigabytes a second."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 18):
            digest.update(block)
    return digest.hexdigest()
