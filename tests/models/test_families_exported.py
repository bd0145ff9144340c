"""Every family through export and back: the same vectors, in this project and in transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.export.folder import export
from cocoa_pl.models.loading import FAMILIES, Loaded


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
