"""Published adapter folders in both key layouts: they load whole, or one sentence says why not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cocoa_pl.data.batch import Batch
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import base_path, merge_adapter
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, Loaded, load
from cocoa_pl.run import open_model
from tests.configs import composed

# As published: by the last part of the name, the same for every layout.
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj", "qkv"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Change = Callable[[dict[str, Tensor]], object]


def older(key: str) -> str:
    """The names that transformers wrote until 4.51."""
    key = key.replace("base_model.model.model.visual.", "base_model.model.visual.")
    return key.replace("base_model.model.model.language_model.", "base_model.model.model.")


def current(key: str) -> str:
    key = key.replace("base_model.model.visual.", "base_model.model.model.visual.")
    return re.sub(
        r"^base_model\.model\.model\.(?!language_model|visual)",
        "base_model.model.model.language_model.",
        key,
    )


LAYOUTS = {"older": older, "current": current}


@pytest.fixture(scope="session")
def save_adapter(after_training: Callable[[Any], Any], tiny_folder: Path) -> Callable[..., Path]:
    """Gives a backbone an adapter as after some training, and writes it as peft does, under the
    names of a layout.
    """

    def save(
        backbone: Backbone, folder: Path, layout: Callable[[str], str], **options: Any
    ) -> Path:
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": TARGETS, **options})
        model: Any = after_training(peft.get_peft_model(backbone.model, config))  # type: ignore[arg-type]
        backbone.model = model
        model.save_pretrained(folder)
        weights = load_file(folder / WEIGHTS)
        save_file({layout(key): value for key, value in weights.items()}, folder / WEIGHTS)
        describe(folder, base_model_name_or_path=str(tiny_folder))
        return folder

    return save


def describe(folder: Path, **changes: object) -> None:
    """Change fields of its `adapter_config.json`."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@torch.no_grad()
def embed(backbone: Backbone, batch: Batch) -> Tensor:
    return backbone.eval().embed(batch)


def open_adapter(folder: Path, base: Path) -> Loaded:
    loaded = load(base, kernel="sdpa", dtype="float32", gradient_checkpointing=False)
    return merge_adapter(loaded, folder)


EXPRESSION = r"model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "ranks of their own": {
        "rank_pattern": {"q_proj": 3, r"layers\.0\.mlp\.down_proj": 4},
        "alpha_pattern": {"q_proj": 5, "qkv": 2},
    },
    "expression": {"target_modules": EXPRESSION},
}


@pytest.mark.parametrize(
    ("family", "kind", "layout"),
    [
        *(("qwen2_vl", kind, "older") for kind in KINDS),
        *((family, "dora", "current") for family in FAMILIES),
        ("qwen2_vl", "expression", "current"),
    ],
    indirect=["family"],
    scope="session",
)
def test_vectors_are_those_of_the_peft_model(
    kind: str,
    layout: str,
    load_tiny: Callable[..., Loaded],
    save_adapter: Callable[..., Path],
    tiny_folder: Path,
    batch: Batch,
    tmp_path: Path,
) -> None:
    backbone = load_tiny().backbone
    before = embed(backbone, batch)
    save_adapter(backbone, tmp_path, LAYOUTS[layout], **KINDS[kind])
    if kind == "expression" and layout == "older":
        describe(tmp_path, target_modules=EXPRESSION.replace("model\\.language_model", "model"))
    expected = embed(backbone, batch)
    found = open_adapter(tmp_path, tiny_folder).backbone
    torch.testing.assert_close(embed(found, batch), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2
    assert not isinstance(found.model, peft.PeftModel)
    assert all(parameter.requires_grad for parameter in found.parameters())


# --- What is refused -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def intact(
    load_tiny: Callable[..., Loaded],
    save_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A DoRA adapter in the older layout."""
    place = tmp_path_factory.mktemp("adapter")
    return save_adapter(load_tiny().backbone, place, older, use_dora=True)


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(intact, tmp_path / "adapter"))


V = "base_model.model.model.layers.1.self_attn.v_proj"


def zero(weights: dict[str, Tensor]) -> None:
    for key, value in weights.items():
        if ".lora_B." in key:
            value.zero_()


def repeat_current(weights: dict[str, Tensor]) -> None:
    for key in [key for key in weights if key.startswith(V)]:
        weights[current(key)] = weights[key].clone()


DAMAGES: dict[str, tuple[Change, str]] = {
    "a missing matrix": (
        lambda w: w.pop(f"{V}.lora_B.weight"),
        rf"misses {re.escape(V)}\.lora_B",
    ),
    "a layer too many": (
        lambda w: w.update(
            {key.replace("v_proj", "k_proj"): w[key].clone() for key in list(w) if V in key}
        ),
        r"holds .*\.layers\.1\.self_attn\.k_proj\.lora_A\.weight, which target_modules does not",
    ),
    "another kind of weight": (
        lambda w: w.update({"base_model.model.lm_head.weight": torch.ones(2)}),
        r"base_model\.model\.lm_head\.weight belongs to no LoRA or DoRA layer",
    ),
    "the same layer twice": (
        repeat_current,
        rf"holds {re.escape(current(V))}\.lora_A\.weight, which target_modules does not ask for",
    ),
    "another size": (
        lambda w: w.update({f"{V}.lora_A.weight": torch.ones(2, 33)}),
        rf"size mismatch for {re.escape(V)}\.lora_A.*\[2, 33\].*\[2, 32\].* is its base",
    ),
    "an untrained one": (zero, "was never trained: all lora_B are zero"),
    "values that are none": (
        lambda w: w[f"{V}.lora_B.weight"].fill_(float("nan")),
        "cannot be merged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_by_name(damage: str, folder: Path, tiny_folder: Path) -> None:
    change, message = DAMAGES[damage]
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(UserError, match=message):
        open_adapter(folder, tiny_folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "IA3 adapters are not supported, only LoRA and DoRA"),
        ("use_dora", False, "holds .*lora_magnitude_vector.*, which target_modules"),
        ("init_lora_weights", "pissa", "changed the base's weights"),
        ("ensure_weight_tying", True, "ensure_weight_tying=True is not understood"),
        ("layer_replication", [[0, 2], [1, 2]], "layer_replication=.* is not understood"),
        ("invented_later", {"a": 1}, "invented_later=.* is not understood"),
        ("target_modules", None, r"adapter_config\.json: .*target_modules"),
        ("target_modules", ["nothing"], r"adapter_config\.json: .*nothing.* not found in the base"),
        ("target_modules", [*TARGETS, "k_proj"], r"misses .*k_proj.*, which target_modules asks"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    key: str, value: object, message: str, folder: Path, tiny_folder: Path
) -> None:
    describe(folder, **{key: value})
    with pytest.raises(UserError, match=message):
        open_adapter(folder, tiny_folder)


def test_unreadable_files_are_refused(folder: Path, tiny_folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    neither = r"neither adapter_model\.safetensors nor adapter_model\.bin"
    with pytest.raises(UserError, match=neither):
        open_adapter(folder, tiny_folder)
    for text in ("", "[]", "{}"):
        (folder / CONFIG).write_text(text)
        with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
            open_adapter(folder, tiny_folder)


def test_weights_of_older_releases_of_peft_are_read(folder: Path, tiny_folder: Path) -> None:
    expected = open_adapter(folder, tiny_folder).backbone.state_dict()
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "adapter_model.bin")
    found = open_adapter(folder, tiny_folder).backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    torch.save({"code": Path}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match="its weights cannot be loaded: Weights only load failed"):
        open_adapter(folder, tiny_folder)


def test_model_and_adapter_in_one_folder_are_refused(folder: Path, tiny_folder: Path) -> None:
    shutil.copy(tiny_folder / "model.safetensors", folder)
    with pytest.raises(UserError, match=r"holds a model \(model\.safetensors\) and an adapter"):
        open_adapter(folder, tiny_folder)
    with pytest.raises(UserError, match="go into folders of their own"):
        load(folder, kernel="sdpa", dtype="float32", gradient_checkpointing=False)


# --- Where the base is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "/their/disk/Qwen2.5-VL-3B-Instruct",
        "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/66285546d",
        "/home/me/.cache/modelscope/hub/models/Qwen/Qwen2___5-VL-3B-Instruct",
        r"C:\models\Qwen2.5-VL-3B-Instruct",
    ],
)
def test_copy_of_the_base_counts_by_its_name(base: str, folder: Path) -> None:
    describe(folder, base_model_name_or_path=base)
    for copy in ("Qwen/Qwen2.5-VL-3B-Instruct", "/data/Qwen2.5-VL-3B-Instruct/"):
        assert base_path(folder, copy=copy) == copy
    if base.startswith("Qwen/"):
        assert base_path(folder, copy="/data/other") == base
    else:
        with pytest.raises(UserError, match=r"not here.*path=/path/to/Qwen2\.5-VL-3B-Instruct$"):
            base_path(folder, copy="/data/other")


@pytest.mark.parametrize(
    ("base", "revision", "message"),
    [
        ("/their/disk/tiny", None, r"for /their/disk/tiny, which is not here.*/path/to/tiny$"),
        (None, None, "does not name its base_model_name_or_path"),
        ("Qwen/Qwen2", "1f00", r"revision 1f00 of Qwen/Qwen2; .*model\.source\.path=Qwen2$"),
    ],
)
def test_base_that_is_not_here_is_refused(
    base: str | None, revision: str | None, message: str, folder: Path
) -> None:
    describe(folder, base_model_name_or_path=base, revision=revision)
    with pytest.raises(UserError, match=message):
        base_path(folder, copy=None)


def test_training_starts_from_an_adapter_on_its_base_or_a_local_copy_of_it(
    folder: Path, tiny_folder: Path, tmp_path: Path, batch: Batch
) -> None:
    expected = embed(open_adapter(folder, tiny_folder).backbone, batch)
    loaded = open_model(composed(f"init_from={folder}"), lambda: [])
    torch.testing.assert_close(embed(loaded.backbone, batch), expected)
    assert loaded.folder == folder
    describe(folder, base_model_name_or_path="someone/tiny-model")
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "tiny-model"))
    options = ("model=qwen2vl", "model.dtype=float32", "model.gradient_checkpointing=false")
    cfg = composed(f"init_from={folder}", *options, f"model.source.path={copy}")
    torch.testing.assert_close(embed(open_model(cfg, lambda: []).backbone, batch), expected)
    with pytest.raises(UserError, match=r"someone/tiny-model is not on this disk.*path=/path/to"):
        open_model(composed(f"init_from={folder}"), lambda: [])


def test_adapter_alone_is_no_embedder(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"train\.py init_from={folder}"):
        Embedder.load(str(folder), device="cpu")
