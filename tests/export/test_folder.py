"""The exported folder is an ordinary Hugging Face model that gives the same vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cocoa_pl.attention import Policy
from cocoa_pl.config.saved import _settings
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.export.folder import export
from cocoa_pl.models.adapters import FullTuning
from cocoa_pl.models.exported import _digest, take_fingerprint, write_description
from cocoa_pl.models.loading import Loaded

NAMES = ("causal", "bidirectional")
LINEAGE = [
    {"stage": "contrast", "steps": 3, "batch_size": 4, "lr": 1e-4, "policy": "all", "seed": 3}
]

LoadTiny = Callable[..., Loaded]


@pytest.fixture(scope="module")
def causal(loaded: Loaded, processor: Processor, policies: dict[str, Policy]) -> Embedder:
    return Embedder(loaded.backbone, processor, policies["causal"])


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, causal: Embedder, embedder: Embedder
) -> dict[str, Path]:
    """One folder for each policy."""
    folders = {name: tmp_path_factory.mktemp(name) / "model" for name in NAMES}
    export(causal, folders["causal"], lineage=LINEAGE)
    export(embedder, folders["bidirectional"], lineage=LINEAGE)
    return folders


@pytest.fixture
def copy(exported: dict[str, Path], tmp_path: Path) -> Path:
    """An exported folder to be tampered with."""
    return Path(shutil.copytree(exported["bidirectional"], tmp_path / "model"))


def test_an_exported_model_sees_by_its_own_policy(exported: dict[str, Path]) -> None:
    """A run is its exported model; that stock transformers gives its vectors is in test_parity."""
    of_the_run, causal, bidirectional = (
        Embedder.load(str(folder), device="cpu").encode(["a red dog", "two boats"])
        for folder in (exported["causal"].parent, exported["causal"], exported["bidirectional"])
    )
    np.testing.assert_array_equal(of_the_run, causal)
    assert np.abs(causal - bidirectional).max() > 1e-2
    for policy, folder in exported.items():
        text = json.loads((folder / "config.json").read_text())["text_config"]
        assert text["is_causal"] == (policy == "causal")


def test_cocoa_json_holds_what_vectors_depend_on(
    exported: dict[str, Path], processor: Processor
) -> None:
    described = json.loads((exported["bidirectional"] / "cocoa.json").read_text())
    assert described["policy"]["name"] == "bidirectional"
    assert described["pooling"] == "eos"
    assert described["normalize"] is True
    assert described["eos_token_id"] == processor.eos_id
    assert described["lineage"] == LINEAGE
    assert np.array(described["fingerprint"]).shape == (3, 32)


def test_rotary_frequencies_are_not_rounded_with_the_weights(
    load_tiny: LoadTiny, causal: Embedder, tmp_path: Path
) -> None:
    """In bfloat16 they would turn the states of late positions by whole radians."""
    half = load_tiny(dtype="bfloat16").backbone
    trained = Embedder(half, causal.processor, causal.policy)
    whole = export(trained, tmp_path / "model", lineage=[])
    buffers = {
        name: buffer
        for name, buffer in whole.backbone.stock.named_buffers()
        if name.endswith("inv_freq")
    }
    assert buffers
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    assert {p.dtype for p in whole.backbone.stock.parameters()} == {torch.bfloat16}


def test_what_rounding_moved_is_recorded_once(
    load_tiny: LoadTiny, causal: Embedder, tmp_path: Path
) -> None:
    half = FullTuning()(load_tiny(dtype="bfloat16").backbone)
    trained = Embedder(half, causal.processor, causal.policy)
    for parameter in trained.backbone.stock.parameters():
        parameter.data *= 1.003  # between two numbers of bfloat16
    before = take_fingerprint(trained.encode)
    whole = export(trained, tmp_path / "model", lineage=[])
    moved = np.abs(take_fingerprint(whole.encode) - before).max()
    described = json.loads((tmp_path / "model/cocoa.json").read_text())
    assert described["rounding"] == pytest.approx(moved)
    assert moved > 1e-5


def test_exporting_again_keeps_added_files(copy: Path, causal: Embedder) -> None:
    (copy / "notes").mkdir()
    (copy / "notes/mine.txt").write_text("mine")
    (copy / ".git/refs").mkdir(parents=True)
    (copy / "link").symlink_to("nowhere")
    export(causal, copy, lineage=[])
    assert (copy / "notes/mine.txt").read_text() == "mine"
    assert (copy / ".git/refs").is_dir()
    assert (copy / "link").is_symlink()
    assert [p.name for p in copy.parent.iterdir()] == ["model"]
    assert Embedder.load(str(copy), device="cpu").policy.name == "causal"


@pytest.mark.parametrize("name", ["config.json", "cocoa.json", "generation_config.json"])
def test_an_edited_file_is_not_overwritten(name: str, copy: Path, causal: Embedder) -> None:
    path = copy / name
    path.write_text(edited := path.read_text().replace("{", '{"mine": 1,', 1))
    with pytest.raises(UserError, match=rf"{name} was changed .*move it elsewhere, or export"):
        export(causal, copy, lineage=[])
    assert path.read_text() == edited
    path.unlink()
    if name != "cocoa.json":  # without it the folder is no export
        export(causal, copy, lineage=[])
        assert "mine" not in path.read_text()


def test_a_file_of_no_export_is_not_overwritten(causal: Embedder, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("another model's")
    with pytest.raises(UserError, match=r"config\.json is of no export and would be overwritten"):
        export(causal, tmp_path, lineage=[])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["another model's"]


def test_an_export_that_fails_leaves_the_older_one(
    copy: Path, causal: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(p.name for p in copy.iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(causal.processor.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        export(causal, copy, lineage=[])
    assert sorted(p.name for p in copy.iterdir()) == before
    assert [p.name for p in copy.parent.iterdir()] == ["model"]


def test_every_file_that_vectors_depend_on_is_compared(copy: Path) -> None:
    needed = json.loads((copy / "cocoa.json").read_text())["files"]
    assert {
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(needed)
    for name in needed:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit
        with pytest.raises(UserError, match=rf"{name} was changed since the model was exported"):
            Embedder.load(str(copy), device="cpu")
        (copy / name).unlink()
        with pytest.raises(UserError, match=rf"{name} (is missing; export the model again|in it)"):
            Embedder.load(str(copy), device="cpu")
        (copy / name).write_bytes(content)
    (copy / "generation_config.json").write_text("{}")  # embeds nothing
    Embedder.load(str(copy), device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"name": "causal"}}, "was changed since the model was exported"),
        ({"max_length": 127}, "was changed since the model was exported"),
        ({"files": {}}, "was changed since the model was exported"),
        ({"digest": None}, "was changed since the model was exported"),
        ({"format": 99}, "format 99 is not 2; update cocoa_pl"),
    ],
)
def test_a_changed_cocoa_json_is_refused(change: dict[str, Any], message: str, copy: Path) -> None:
    path = copy / "cocoa.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Embedder.load(str(copy), device="cpu")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_the_same_files_that_give_other_vectors_are_refused(value: float, copy: Path) -> None:
    """As another version of a library may."""
    described = json.loads((copy / "cocoa.json").read_text())
    write_description(copy, {**described, "fingerprint": [[value] * 32] * 3})
    with pytest.raises(UserError, match=r"does not give the vectors .* another version of torch"):
        Embedder.load(str(copy), device="cpu")


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", "[1]", "null", '{"format": 2, "lineage": 3}', "[" * 100_000, "\0"],
    ids=str.__len__,
)
def test_a_damaged_cocoa_json_is_named_whoever_reads_it(content: str, copy: Path) -> None:
    (copy / "cocoa.json").write_text(content)
    for read in (Embedder.load, _settings):
        with pytest.raises(UserError, match=r"cocoa\.json describes no model; export it again"):
            read(str(copy))


def edits(node: Any) -> Iterator[Any]:
    """Copies of a JSON value, each without one of its parts or with another value there."""
    is_list = isinstance(node, list)
    for key in range(min(2, len(node))) if is_list else list(node):
        inner = edits(node[key]) if isinstance(node[key], dict | list) else ()
        for value in (None, "x", {"a": 1}, *inner):
            yield [*node[:key], value, *node[key + 1 :]] if is_list else {**node, key: value}
        yield node[:key] + node[key + 1 :] if is_list else {k: node[k] for k in node if k != key}


def test_a_cocoa_json_that_was_edited_and_given_its_digest_is_a_model_or_one_sentence(
    copy: Path,
) -> None:
    whole = json.loads((copy / "cocoa.json").read_text())
    del whole["fingerprint"][1:]  # refused as it is, when all else is whole
    for unread in ("pooling", "normalize", "eos_token_id", "mask_token_id"):
        del whole[unread]
    refused = set()
    for edited in edits(whole):
        content = json.dumps({**edited, "digest": _digest(edited)})
        (copy / "cocoa.json").write_text(content)
        with pytest.raises(UserError) as caught:
            Embedder.load(str(copy), device="cpu")
        refused.add(str(caught.value).rpartition("cocoa.json ")[2])
    assert "describes no model; export it again" in refused


def test_an_editor_may_have_saved_cocoa_json_otherwise(copy: Path) -> None:
    """With a byte order mark, in other lines."""
    described = json.loads((copy / "cocoa.json").read_text())
    (copy / "cocoa.json").write_text("\ufeff" + json.dumps(described), encoding="utf-8")
    assert Embedder.load(str(copy), device="cpu").policy.name


def test_a_model_of_others_is_not_an_embedder(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"holds no cocoa\.json: it was not exported by cocoa_pl"):
        Embedder.load(str(tiny_folder), device="cpu")
