"""The tiny model is an ordinary Hugging Face folder, built once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
)

from cocoa_pl.models.tiny import SPECIAL_TOKENS, TinySource

MakeSource = Callable[..., TinySource]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForImageTextToText.from_pretrained(
        folder
    ).state_dict()
    return state


def test_plain_transformers_loads_the_folder_and_generates(tiny_folder: Path) -> None:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tiny_folder, output_loading_info=True)
    model, info = loaded
    assert model.config.model_type == "qwen2_vl"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("two boats", return_tensors="pt")["input_ids"]
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False
    )
    assert generated.shape[1] > ids.shape[1]


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


def test_image_processor_keeps_the_given_bounds(tiny_folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(tiny_folder, backend="pil")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (784, 56 * 84)
    assert (processor.patch_size, processor.merge_size) == (14, 2)


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
    assert make_source().folder(texts) == tiny_folder
    assert make_source().folder([*reversed(texts), *texts]) == tiny_folder


def test_other_values_texts_and_seeds_get_folders_of_their_own(
    make_source: MakeSource, texts: list[str], tmp_path: Path
) -> None:
    sources: list[tuple[dict[str, Any], list[str]]] = [
        ({}, texts),
        ({"seed": 1}, texts),
        ({"num_hidden_layers": 1}, texts),
        ({}, texts[:1]),
    ]
    folders = [make_source(cache_dir=tmp_path, **kw).folder(given) for kw, given in sources]
    assert len(set(folders)) == 4
    assert set(folders) == set(tmp_path.iterdir()), "no scratch folder stays behind"


def test_weights_follow_from_the_seed_and_from_nothing_else(
    make_source: MakeSource, texts: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = make_source(cache_dir=tmp_path).folder(texts)
    other = make_source(cache_dir=tmp_path, seed=1).folder(texts)
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
            source.folder(texts)
    assert list(tmp_path.iterdir()) == []
    assert (source.folder(texts) / "model.safetensors").is_file()
