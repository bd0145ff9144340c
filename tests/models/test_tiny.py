"""The tiny models are ordinary Hugging Face folders, built once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import FAMILIES
from cocoa_pl.models.tiny import SPECIAL_TOKENS, TWINS, TinySource

CONF = Path(__file__).parents[2] / "conf"
every_family = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")
MakeSource = Callable[..., TinySource]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForImageTextToText.from_pretrained(
        folder
    ).state_dict()
    return state


@every_family
def test_plain_transformers_loads_the_folder_and_generates(family: str, tiny_folder: Path) -> None:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tiny_folder, output_loading_info=True)
    model, info = loaded
    assert model.config.model_type == family
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("two boats", return_tensors="pt")["input_ids"]
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False
    )
    assert generated.shape[1] > ids.shape[1]


@every_family
def test_special_tokens_have_the_ids_of_the_config(tiny_folder: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == config.text_config.eos_token_id
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.vision_end_token_id == tokenizer.convert_tokens_to_ids("<|vision_end|>")


def test_reserved_rows_stay_behind_the_vocabulary(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    rows = AutoConfig.from_pretrained(tiny_folder).text_config.vocab_size
    assert rows == 320 + 4
    assert len(tokenizer) <= 320


@every_family
def test_image_processor_keeps_the_given_bounds_and_reads_pixels_like_the_large_models(
    family: str, tiny_folder: Path, token_side: int
) -> None:
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_folder)
    bounds = (processor.size["shortest_edge"], processor.size["longest_edge"])
    assert bounds == (token_side**2, 6 * token_side**2)
    assert (processor.patch_size, processor.merge_size) == (token_side // 2, 2)
    grey = family == "qwen3_vl"
    assert list(processor.image_mean) == (
        [0.5] * 3 if grey else [0.48145466, 0.4578275, 0.40821073]
    )
    assert list(processor.image_std) == (
        [0.5] * 3 if grey else [0.26862954, 0.26130258, 0.27577711]
    )


def test_every_family_has_a_twin_and_another_is_refused(tmp_path: Path) -> None:
    assert set(TWINS) == set(FAMILIES)
    with pytest.raises(UserError, match=r"model\.source\.family: there is no qwen9, only qwen2_vl"):
        TinySource(
            cache_dir=str(tmp_path),
            family="qwen9",
            seed=0,
            vocabulary_size=300,
            reserved_rows=1,
            text={},
            vision={},
            min_pixels=1,
            max_pixels=1,
        )


@pytest.mark.parametrize("name", ["tiny", "tiny_qwen25vl", "tiny_qwen3vl"])
def test_tiny_models_are_of_the_size_their_files_tell(
    name: str, texts: list[str], tmp_path: Path
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}", f"cache_dir={tmp_path}"])
    source: TinySource = instantiate(cfg.model.source, _convert_="all")
    found = weights(source.folder(lambda: texts))
    assert 0.9e6 < sum(value.numel() for value in found.values()) < 2e6
    side = 32 if name == "tiny_qwen3vl" else 28
    assert (cfg.model.min_pixels, cfg.model.max_pixels) == (side**2, (4 * side) ** 2)


@pytest.mark.parametrize(
    "text", ["two boats", "ZEBRA 42?!", "naïve café, Ω ≈ 3", "日本 🐶", " a  b\n\tc "]
)
def test_tokenizer_spells_any_text(text: str, tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_second_build_finds_the_first(
    make_source: MakeSource, texts: list[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(TinySource, "_build", fail)
    assert make_source().folder(lambda: texts) == tiny_folder
    assert make_source().folder(lambda: [*reversed(texts), *texts]) == tiny_folder


def test_other_values_texts_and_seeds_get_folders_of_their_own(
    make_source: MakeSource, texts: list[str], tmp_path: Path
) -> None:
    sources: list[tuple[dict[str, Any], list[str]]] = [
        ({}, texts),
        ({"seed": 1}, texts),
        ({"num_hidden_layers": 1}, texts),
        ({}, texts[:1]),
    ]
    folders = [
        make_source(cache_dir=tmp_path, **kw).folder(lambda given=given: given)
        for kw, given in sources
    ]
    assert len(set(folders)) == 4
    assert set(folders) == set(tmp_path.iterdir()), "no scratch folder stays behind"


def test_weights_follow_from_the_seed_and_from_nothing_else(
    make_source: MakeSource, texts: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = make_source(cache_dir=tmp_path).folder(lambda: texts)
    other = make_source(cache_dir=tmp_path, seed=1).folder(lambda: texts)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = weights(tiny_folder), weights(again)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    name = "lm_head.weight"
    assert not torch.equal(weights(other)[name], first[name])


def test_interrupted_build_leaves_no_folder(
    make_source: MakeSource, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    source = make_source(cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Qwen2VLForConditionalGeneration, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            source.folder(lambda: texts)
    assert list(tmp_path.iterdir()) == []
    assert (source.folder(lambda: texts) / "model.safetensors").is_file()
