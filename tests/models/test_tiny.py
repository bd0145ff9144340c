"""The tiny models are ordinary Hugging Face folders, built once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
from tests.configs import composed

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
def test_tokens_of_the_tokenizer_are_those_of_the_config(tiny_folder: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    token = tokenizer.convert_tokens_to_ids
    assert token(list(SPECIAL_TOKENS)) == list(range(7))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == config.text_config.eos_token_id
    assert config.image_token_id == token("<|image_pad|>")
    assert config.video_token_id == token("<|video_pad|>")
    assert config.vision_start_token_id == token("<|vision_start|>")
    assert config.vision_end_token_id == token("<|vision_end|>")
    assert len(tokenizer) <= 320
    assert config.text_config.vocab_size == 320 + 4, "reserved rows stay behind the vocabulary"


@every_family
def test_image_processor_keeps_the_given_bounds_and_reads_pixels_like_the_large_models(
    family: str, tiny_folder: Path, token_side: int
) -> None:
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_folder)
    bounds = (processor.size["shortest_edge"], processor.size["longest_edge"])
    assert bounds == (token_side**2, 6 * token_side**2)
    assert (processor.patch_size, processor.merge_size) == (token_side // 2, 2)
    clip = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    expected = ([0.5] * 3, [0.5] * 3) if family == "qwen3_vl" else clip
    assert (list(processor.image_mean), list(processor.image_std)) == expected


def test_every_family_has_a_twin_and_another_is_refused(make_source: MakeSource) -> None:
    assert set(TWINS) == set(FAMILIES)
    values = make_source().values | {"cache_dir": ".", "family": "qwen9"}
    with pytest.raises(UserError, match=r"model\.source\.family: there is no qwen9, only qwen2_vl"):
        TinySource(**values)


@pytest.mark.parametrize("name", ["tiny", "tiny_qwen25vl", "tiny_qwen3vl"])
def test_tiny_models_are_of_the_size_their_files_tell(
    name: str, texts: list[str], tmp_path: Path
) -> None:
    cfg = composed(f"model={name}", f"cache_dir={tmp_path}")
    source: TinySource = instantiate(cfg.model.source, _convert_="all")
    found = weights(source.folder(lambda: texts))
    assert 0.9e6 < sum(value.numel() for value in found.values()) < 2e6
    side = 32 if name == "tiny_qwen3vl" else 28
    assert (cfg.model.min_pixels, cfg.model.max_pixels) == (side**2, (4 * side) ** 2)


def test_a_folder_is_found_again_by_values_texts_and_seed(
    make_source: MakeSource, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices: list[tuple[dict[str, Any], list[str]]] = [
        ({}, texts),
        ({"seed": 1}, texts),
        ({"num_hidden_layers": 1}, texts),
        ({}, texts[:1]),
    ]

    def folders() -> list[Path]:
        return [
            make_source(cache_dir=tmp_path, **values).folder(lambda given=given: given)
            for values, given in choices
        ]

    built = folders()
    assert len(set(built)) == 4
    assert set(built) == set(tmp_path.iterdir()), "no scratch folder stays behind"
    monkeypatch.delattr(TinySource, "_build")
    choices[0] = ({}, [*reversed(texts), *texts])
    assert folders() == built


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
