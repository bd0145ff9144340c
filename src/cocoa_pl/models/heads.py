"""Hidden states in, pixels of hidden visual tokens out: the image decoder of the warm-up stage."""

from torch import Tensor, nn

from cocoa_pl.attention import Plan
from cocoa_pl.batch import Batch
from cocoa_pl.models.backbone import Backbone


class ImageDecoder(nn.Module):
    """One decoder layer of the backbone's own kind and a linear projection (as in MoCa, arXiv
    2506.23115).

    It predicts one frame for each visual token; the temporal copy of a still image is redundant.

    Args:
        backbone: lends the kind of layer, not its weights; not registered as a submodule.
        patch_values: values of one patch of one frame (channels x side x side).
    """

    def __init__(self, backbone: Backbone, *, patch_values: int) -> None:
        super().__init__()
        self.layer = backbone.decoder_layer()
        self.projection = nn.Linear(backbone.hidden_size, patch_values * backbone.merge_size**2)

    def forward(
        self, backbone: Backbone, hidden: Tensor, batch: Batch, plan: Plan, patch_mask: Tensor
    ) -> Tensor:
        """(T, D) states to (V, merge_size ** 2 * B) normalised pixels of the V hidden visual
        tokens.
        """
        with backbone.autocast():
            states = backbone.run_layer(self.layer, hidden, batch, plan)
            rows = states.index_select(0, patch_mask.nonzero()[:, 0])
            pixels: Tensor = self.projection(rows)
        return pixels


def token_pixels(pixels: Tensor, batch: Batch, patch_mask: Tensor, *, merge_size: int) -> Tensor:
    """What the decoder should have said: (P, B) -> (V, merge_size ** 2 * B) for the hidden visual
    tokens.
    """
    tokens = pixels.view(-1, merge_size**2 * pixels.shape[1])
    return tokens.index_select(0, patch_mask[batch.image_mask].nonzero()[:, 0])
