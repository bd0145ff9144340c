"""Every family through export and back: the same vectors, in this project and in transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.export.folder import export
from cocoa_pl.models.adapters import LowRank
from cocoa_pl.models.loading import FAMILIES, Loaded

pytestmark = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")

ALL = ("context", "eos", "target")
POLICY = Policy("bidirectional", ALL, ALL, ALL, False)


def adapted(loaded: Loaded) -> Loaded:
    """With a DoRA adapter as after some training, on both towers."""
    low_rank = LowRank(
        lean_dora=False,
        dropout_on_base=True,
        rank=2,
        alpha=8,
        dropout=0.1,
        init="gaussian",
        use_dora=True,
        target_modules=[r".*layers\.\d+\..*_proj", r".*visual\.blocks\.\d+\..*(qkv|fc\d|_proj)"],
    )
    low_rank(loaded.backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.backbone.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return loaded


def test_saved_and_loaded_model_gives_the_same_vectors(
    load_tiny: Callable[..., Loaded],
    processor: Processor,
    make_item: Callable[..., Item],
    tmp_path: Path,
) -> None:
    loaded = adapted(load_tiny())
    embedder = Embedder(loaded.backbone, processor, POLICY)
    items = [make_item(seed, images=seed % 3) for seed in range(6)]
    before = embedder.encode(items)
    export(embedder, tmp_path / "model", lineage=[])
    after = Embedder.load(str(tmp_path / "model"), device="cpu").encode(items)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(items), before, rtol=0, atol=1e-6)


def test_model_without_a_vocabulary_head_embeds_and_is_exported_without_one(
    load_tiny: Callable[..., Loaded],
    untied_folder: Path,
    headless_folder: Path,
    processor: Processor,
    make_item: Callable[..., Item],
    tmp_path: Path,
) -> None:
    items = [make_item(seed, images=seed % 3) for seed in range(3)]
    whole, headless = (
        Embedder(load_tiny(folder=folder).backbone, processor, POLICY)
        for folder in (untied_folder, headless_folder)
    )
    export(headless, tmp_path / "model", lineage=[])
    exported = Embedder.load(str(tmp_path / "model"), device="cpu")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert np.array_equal(exported.encode(items), whole.encode(items))


def test_plain_transformers_gives_the_same_vectors(
    load_tiny: Callable[..., Loaded],
    processor: Processor,
    make_item: Callable[..., Item],
    tmp_path: Path,
) -> None:
    embedder = Embedder(adapted(load_tiny()).backbone, processor, POLICY)
    item = make_item(2, images=2)
    vector = torch.from_numpy(embedder.encode([item])[0])
    export(embedder, tmp_path / "model", lineage=[])
    stock = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", attn_implementation="eager"
    ).eval()
    sample = processor.encode(item, None, key=0, seed=0, row_id="toy")
    pictures = processor.image_processor(list(item.media), return_tensors="pt")
    with torch.no_grad():
        states = stock.model(
            input_ids=sample.input_ids[None],
            mm_token_type_ids=sample.image_mask[None].int(),
            attention_mask=torch.ones_like(sample.input_ids)[None],
            **pictures,
        ).last_hidden_state[0]
    expected = states[-1] / states[-1].norm()
    torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
