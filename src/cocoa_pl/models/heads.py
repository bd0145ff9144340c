"""Hidden states in, pixels of hidden visual tokens out: the image decoder of the warm-up stage."""

from torch import Tensor, nn

from cocoa_pl.batch import Batch
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.layout import Layout


class ImageDecoder(nn.Module):
    """One decoder layer of the backbone's own kind and a linear projection (as in MoCa, arXiv
    2506.23115).

    It predicts one frame for each hidden visual token, and computes what that takes: keys and
    values of all tokens, all else of those. The temporal copy of a still image is redundant.

    Args:
        backbone: lends the kind of layer, not its weights; not registered as a submodule.
        patch_values: values of one patch of one frame (channels x side x side).
    """

    def __init__(self, backbone: Backbone, *, patch_values: int) -> None:
        super().__init__()
        self.layer = backbone.decoder_layer()
        self.projection = nn.Linear(backbone.hidden_size, patch_values * backbone.merge_size**2)

    def forward(
        self, backbone: Backbone, hidden: Tensor, batch: Batch, layout: Layout, rows: Tensor
    ) -> Tensor:
        """(T, D) states to (V, merge_size ** 2 * B) normalised pixels.

        Args:
            rows: (V) int64, the hidden visual tokens.
        """
        with backbone.autocast():
            states = backbone.run_layer(self.layer, hidden, batch, layout, rows)
            pixels: Tensor = self.projection(states)
        return pixels


def token_pixels(pixels: Tensor, places: Tensor, *, merge_size: int) -> Tensor:
    """What the decoder should have said: (P, B) -> (V, merge_size ** 2 * B).

    Args:
        places: (V) int64, the wanted ones among all visual tokens.
    """
    tokens = pixels.view(-1, merge_size**2 * pixels.shape[1])
    return tokens.index_select(0, places)
