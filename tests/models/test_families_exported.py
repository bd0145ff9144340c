"""Every family through export and back: the same vectors, in this project and in transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cocoa_pl.attention import Policy
from cocoa_pl.data.batch import VISUAL
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.export.folder import export
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, Loaded


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (f != "qwen3_vl")) for f in sorted(FAMILIES)],
    indirect=True,
    scope="session",
)
def test_exported_model_gives_the_same_vectors_here_and_in_plain_transformers(
    adapted: Callable[..., Backbone],
    policies: dict[str, Policy],
    processor: Processor,
    make_item: Callable[..., Item],
    tmp_path: Path,
) -> None:
    embedder = Embedder(adapted(), processor, policies["bidirectional"])
    items = [make_item(seed, images=seed % 3) for seed in range(6)]
    before = embedder.encode(items)
    export(embedder, tmp_path / "model", lineage=[])
    after = Embedder.load(str(tmp_path / "model"), device="cpu").encode(items)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(items), before, rtol=0, atol=1e-6)

    stock = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", attn_implementation="eager"
    ).eval()
    sample = processor(items[2], None, key=0, row_id="toy")
    pictures = processor.image_processor(list(items[2].media), return_tensors="pt")
    with torch.no_grad():
        states = stock.model(
            input_ids=torch.from_numpy(sample.input_ids)[None],
            mm_token_type_ids=torch.from_numpy(sample.kinds == VISUAL)[None].int(),
            attention_mask=torch.ones(1, sample.num_tokens, dtype=torch.int64),
            **pictures,
        ).last_hidden_state[0]
    expected = (states[-1] / states[-1].norm()).numpy()
    np.testing.assert_allclose(before[2], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")
def test_model_without_a_vocabulary_head_embeds_and_is_exported_without_one(
    load_tiny: Callable[..., Loaded],
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
