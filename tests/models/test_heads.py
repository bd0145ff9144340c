"""The image decoder of every family: which states it reads, and which pixels it should say."""

from collections.abc import Callable

import pytest
import torch

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Batch, Encoded, pack
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.models.heads import ImageDecoder, token_pixels
from cocoa_pl.models.loading import FAMILIES, Loaded

pytestmark = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")

ALL = ("context", "eos", "target")
POLICY = Policy("bidirectional", ALL, ALL, ALL, False)


@pytest.fixture
def batch(make_samples: Callable[..., list[Encoded]]) -> Batch:
    return pack(make_samples((2, 0, 1)))


def hide(batch: Batch, *, every: int) -> torch.Tensor:
    """Every so many visual tokens, from the second on."""
    mask = torch.zeros_like(batch.image_mask)
    mask[batch.image_mask.nonzero()[1::every, 0]] = True
    return mask


def test_decoder_says_one_frame_for_each_hidden_visual_token(
    loaded: Loaded, processor: Processor, batch: Batch
) -> None:
    backbone = loaded.backbone
    decoder = ImageDecoder(backbone, patch_values=processor.patch_values)
    hidden = torch.randn(batch.num_tokens, backbone.hidden_size, requires_grad=True)
    mask = hide(batch, every=3)
    rows = mask.nonzero()[:, 0]
    pixels = decoder(backbone, hidden, batch, backbone.layouts(POLICY)(batch), rows)
    assert pixels.shape == (int(mask.sum()), 4 * processor.patch_values)
    pixels.sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert hidden.grad is not None
    assert "backbone" not in dict(decoder.named_children())
    with_images = torch.repeat_interleave(batch.images_per_sample > 0, batch.lengths)
    assert torch.equal(hidden.grad.any(1), with_images), "samples without a hidden token stay out"


def test_targets_are_the_pixels_of_the_hidden_visual_tokens(
    loaded: Loaded, processor: Processor, batch: Batch
) -> None:
    pixels = loaded.backbone.pixels(batch)
    mask = hide(batch, every=2)
    places = mask[batch.image_mask].nonzero()[:, 0]
    targets = token_pixels(pixels, places, merge_size=processor.merge_size)
    visual = batch.image_mask.nonzero()[:, 0].tolist()
    expected = [
        pixels[4 * rank : 4 * rank + 4].flatten()
        for rank, position in enumerate(visual)
        if mask[position]
    ]
    assert torch.equal(targets, torch.stack(expected))


def test_a_visual_token_is_a_square_of_the_image(
    loaded: Loaded, processor: Processor, batch: Batch, token_side: int
) -> None:
    # What corruption hides and the decoder rebuilds belongs to one place of the picture.
    pixels = loaded.backbone.pixels(batch)
    _, rows, columns = batch.grids[0].tolist()
    side = token_side // 2
    first = pixels[: rows * columns].view(rows // 2, columns // 2, 2, 2, 3, side, side)
    picture = first.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * side, columns * side)
    second = torch.tensor([1])
    token = token_pixels(pixels, second, merge_size=processor.merge_size).view(2, 2, 3, side, side)
    column = slice(token_side, 2 * token_side) if columns > 2 else slice(0, token_side)
    row = slice(0, token_side) if columns > 2 else slice(token_side, 2 * token_side)
    square = token.permute(2, 0, 3, 1, 4).reshape(3, token_side, token_side)
    assert torch.equal(square, picture[:, row, column])
