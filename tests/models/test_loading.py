"""Model folders that load, and one sentence for each of those that do not."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.export.folder import export
from cocoa_pl.models import loading
from cocoa_pl.models.loading import (
    FAMILIES,
    Loaded,
    PretrainedSource,
    find_config,
    find_folder,
)

LoadTiny = Callable[..., Loaded]
UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def message(load_tiny: LoadTiny, folder: Path) -> str:
    warned: list[logging.LogRecord] = []  # by transformers, in many lines
    handler, log = logging.Handler(), logging.getLogger("transformers.modeling_utils")
    handler.emit = warned.append  # type: ignore[method-assign]
    log.addHandler(handler)
    with pytest.raises(UserError) as caught:
        load_tiny(folder=folder)
    log.removeHandler(handler)
    assert not warned
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights, name: weights.pop(name), UP),
        (lambda weights, name: weights.update({f"{name}2": weights[name] + 0}), f"{UP}2"),
        (lambda weights, name: weights.update({name: weights[name][:-1] + 0}), UP),
    ],
    ids=["missing", "unexpected", "of another shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, Tensor], str], object],
    named: str,
    load_tiny: LoadTiny,
    folder: Path,
) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights, next(name for name in weights if name.endswith(UP)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"{named} of 1" in message(load_tiny, folder)


def rename_weights(folder: Path, rename: Callable[[str], str]) -> set[str]:
    weights = load_file(folder / "model.safetensors")
    renamed = {rename(name): value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return set(renamed)


def older(name: str) -> str:
    """The names of weights until transformers 4.51: `visual.*` and `model.layers.*`."""
    return re.sub(r"^model\.visual\.", "visual.", name).replace("model.language_model.", "model.")


def current(name: str) -> str:
    """The names that the model's own modules have."""
    name = re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", name)
    return re.sub(r"^visual\.", "model.visual.", name)


@pytest.mark.parametrize("rename", [older, current])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"], indirect=True, scope="session")
def test_weights_under_names_of_both_layouts_load_alike(
    rename: Callable[[str], str], load_tiny: LoadTiny, loaded: Loaded, folder: Path
) -> None:
    names = rename_weights(folder, rename)
    prefix = {"older": "model.layers.0.", "current": "model.language_model.layers.0."}
    assert any(name.startswith(prefix[rename.__name__]) for name in names)
    found = load_tiny(folder=folder).backbone.state_dict()
    expected = loaded.backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True, scope="session")
def test_layout_that_a_family_never_had_is_refused(
    load_tiny: LoadTiny, loaded: Loaded, folder: Path
) -> None:
    assert rename_weights(folder, current) <= set(loaded.backbone.stock.state_dict())
    rename_weights(folder, older)
    assert "weights do not fit the config, first lm_head.weight" in message(load_tiny, folder)


@pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")
def test_model_without_a_vocabulary_head_embeds_and_is_exported_without_one(
    load_tiny: LoadTiny,
    untied_folder: Path,
    headless_folder: Path,
    policies: dict[str, Policy],
    processor: Processor,
    make_item: Callable[..., Item],
    tmp_path: Path,
) -> None:
    items = [make_item(seed, images=seed % 3) for seed in range(3)]
    whole, headless = (
        Embedder(load_tiny(folder=folder).backbone, processor, policies["bidirectional"])
        for folder in (untied_folder, headless_folder)
    )
    export(headless, tmp_path / "model", lineage=[])
    exported = Embedder.load(str(tmp_path / "model"), device="cpu")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert np.array_equal(exported.encode(items), whole.encode(items))


QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "cannot be loaded"),
        ("config.json", "{}", "cannot be loaded"),
        ("config.json", '{"model_type": "no_such_model"}', "cannot be loaded"),
        (
            "config.json",
            '{"model_type": "bert"}',
            r"is a bert model; .* qwen2_5_vl, qwen2_vl",
        ),
        ("config.json", QUANTIZED, "cannot be loaded: .*bitsandbytes"),  # the package it needs
        ("model.safetensors", "half of it", "cannot be loaded"),
        ("model.safetensors", None, "no file named model.safetensors"),
        ("preprocessor_config.json", None, "cannot be loaded: Can't load image processor"),
        ("tokenizer.json", None, "the tokenizer is missing"),
    ],
)
def test_a_missing_or_unusable_file_is_one_sentence(
    name: str, content: Any, reason: str, load_tiny: LoadTiny, folder: Path
) -> None:
    file = folder / name
    if content is None:
        file.unlink()
    elif isinstance(content, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | content))
    else:
        file.write_text(content)
    if name == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    assert re.search(reason, message(load_tiny, folder))


def test_an_unusable_config_is_named_where_no_weights_are_read(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read: "):
        find_config(str(folder))


def texts_are_not_read() -> list[str]:
    raise AssertionError("a model that has a tokenizer asks for no texts")


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path), "./nowhere", str(tmp_path / "nowhere"), "nowhere"):
        with pytest.raises(UserError, match=r"is no model folder: there is no config\.json"):
            find_folder(path)
    with pytest.raises(UserError, match="my models/qwen is neither a model folder nor a name"):
        find_folder("my models/qwen")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), OSError("disk full")])
def test_unreachable_hub_is_one_sentence_that_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> str:
        raise error

    monkeypatch.setattr(loading, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        PretrainedSource(path="Qwen/Qwen2-VL-2B-Instruct").folder(texts_are_not_read)
    assert str(caught.value) == (
        "Qwen/Qwen2-VL-2B-Instruct is not on this disk and the Hugging Face hub cannot be reached "
        f"({type(error).__name__}): download it elsewhere and pass the folder, "
        "model.source.path=/path/to/Qwen2-VL-2B-Instruct"
    )


def test_local_folder_or_the_cache_of_the_hub_is_used(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PretrainedSource(path=str(tiny_folder)).folder(texts_are_not_read) == tiny_folder
    monkeypatch.setattr(loading, "snapshot_download", lambda name: str(tiny_folder))
    assert find_folder("someone/model") == tiny_folder
