"""The tiny models are ordinary Hugging Face folders, built once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hydra.utils import instantiate
from transformers import (
    AutoModelForImageTextToText,
    Qwen2VLForConditionalGeneration,
)

from cocoa_pl.models.loading import FAMILIES
from cocoa_pl.models.tiny import TinySource
from tests.configs import composed

MakeSource = Callable[..., TinySource]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForImageTextToText.from_pretrained(
        folder
    ).state_dict()
    return state


def test_every_family_has_small_models() -> None:
    assert set(get_args(get_type_hints(TinySource)["family"])) == set(FAMILIES)


@pytest.mark.parametrize(
    "name",
    ["tiny", *(pytest.param(f"tiny_{n}", marks=pytest.mark.slow) for n in ("qwen25vl", "qwen3vl"))],
)
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
