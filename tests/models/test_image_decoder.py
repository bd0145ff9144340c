"""The image decoder of every family: its layer follows the batch's plan, and it predicts pixels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cocoa_pl.data.batch import Batch, Sample
from cocoa_pl.data.masking import Masking
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.backbone import ImageDecoder
from cocoa_pl.models.loading import FAMILIES, Loaded

pytestmark = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")

Packed = Callable[..., Batch]


@pytest.fixture
def samples(make_samples: Callable[..., list[Sample]]) -> list[Sample]:
    masking = Masking(text_ratio=0.3, text_segment="context", patch_ratio=0.5, mask_token_id=0)
    return [masking(sample, np.random.default_rng(0)) for sample in make_samples((2, 0, 1))]


def test_decoder_says_one_frame_for_each_hidden_visual_token(
    loaded: Loaded, processor: Processor, samples: list[Sample], packed: Packed
) -> None:
    backbone, batch = loaded.backbone, packed(samples)
    decoder = ImageDecoder(backbone, patch_values=processor.patch_values)
    hidden = torch.randn(batch.num_tokens, backbone.hidden_size, requires_grad=True)
    pixels = decoder(backbone, hidden, batch)
    assert pixels.shape == (len(batch.patch_rows), 4 * processor.patch_values)
    pixels.sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert hidden.grad is not None
    has_image = torch.tensor([len(sample.grids) > 0 for sample in samples])
    read = torch.repeat_interleave(has_image, batch.segment_lengths.sum(1))
    assert torch.equal(hidden.grad.any(1), read), "samples never see each other"
    stock_layers = backbone.stock.model.language_model.layers
    assert type(decoder.layer) is type(stock_layers[0])
    assert all(decoder.layer is not layer for layer in stock_layers)
    assert "backbone" not in dict(decoder.named_children())
