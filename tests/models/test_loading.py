"""Model folders that load, and one sentence for each of those that do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cocoa_pl.errors import UserError
from cocoa_pl.models import loading
from cocoa_pl.models.loading import Loaded, PretrainedSource, find_folder

LoadTiny = Callable[..., Loaded]
UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor], str], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith(UP)]
    change(weights, name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def message(load_tiny: LoadTiny, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tiny(folder=folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folder_loads_in_the_dtype_asked_for(load_tiny: LoadTiny, dtype: str) -> None:
    loaded = load_tiny(dtype=dtype)
    assert {p.dtype for p in loaded.backbone.parameters()} == {getattr(torch, dtype)}
    assert loaded.backbone.byte_values.dtype == torch.float32
    assert loaded.backbone.hidden_size == 32
    assert loaded.backbone.merge_size == 2
    assert loaded.backbone.num_token_rows == 324


def test_other_family_is_refused_by_its_name(load_tiny: LoadTiny, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert message(load_tiny, folder) == f"{folder} is a bert model; supported are qwen2_vl"


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no_such_model"}'])
def test_unusable_config_is_refused(load_tiny: LoadTiny, folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    assert "cannot be loaded" in message(load_tiny, folder)


def test_missing_weight_is_refused_by_name(load_tiny: LoadTiny, folder: Path) -> None:
    change_weights(folder, lambda weights, name: weights.pop(name))
    assert f"{UP} of 1" in message(load_tiny, folder)


def test_unexpected_weight_is_refused_by_name(load_tiny: LoadTiny, folder: Path) -> None:
    change_weights(folder, lambda weights, name: weights.update({f"{name}2": weights[name] + 0}))
    assert f"{UP}2 of 1" in message(load_tiny, folder)


def test_weight_of_another_shape_is_refused_by_name(load_tiny: LoadTiny, folder: Path) -> None:
    change_weights(folder, lambda weights, name: weights.update({name: weights[name][:-1] + 0}))
    assert f"{UP} of 1" in message(load_tiny, folder)


def test_missing_and_truncated_weight_files_are_refused(load_tiny: LoadTiny, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be loaded" in message(load_tiny, folder)
    file.unlink()
    assert "no file named model.safetensors" in message(load_tiny, folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["preprocessor_config.json"], "cannot be loaded: Can't load image processor"),
        (["tokenizer.json", "tokenizer_config.json"], "the tokenizer is missing"),
    ],
)
def test_folder_without_processor_files_is_refused(
    files: list[str], reason: str, load_tiny: LoadTiny, folder: Path
) -> None:
    for name in files:
        (folder / name).unlink()
    assert reason in message(load_tiny, folder)


def test_local_folder_is_taken_as_it_is(tiny_folder: Path) -> None:
    assert PretrainedSource(path=str(tiny_folder)).folder(["unused"]) == tiny_folder


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path), "./nowhere", str(tmp_path / "nowhere"), "nowhere"):
        with pytest.raises(UserError, match=r"is no model folder: there is no config\.json"):
            find_folder(path)


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("offline"),
        OSError("disk full"),
        ConnectionError("no route"),
    ],
)
def test_unreachable_hub_is_one_sentence_that_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> str:
        raise error

    monkeypatch.setattr(loading, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        PretrainedSource(path="Qwen/Qwen2-VL-2B-Instruct").folder([])
    assert str(caught.value) == (
        "Qwen/Qwen2-VL-2B-Instruct is not on this disk and the Hugging Face hub cannot be reached "
        f"({type(error).__name__}): download it elsewhere and pass the folder, "
        "model.source.path=/path/to/Qwen2-VL-2B-Instruct"
    )


def test_downloaded_model_is_used_from_the_cache(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "snapshot_download", lambda name: str(tiny_folder))
    assert find_folder("someone/model") == tiny_folder


def test_name_that_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(UserError, match="my models/qwen is neither a model folder nor a name"):
        find_folder("my models/qwen")
