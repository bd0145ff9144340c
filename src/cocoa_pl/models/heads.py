"""The image decoder of the warm-up stage."""

from torch import Tensor, nn

from cocoa_pl.data.batch import Batch
from cocoa_pl.models.backbone import Backbone


class ImageDecoder(nn.Module):
    """One decoder layer of the backbone's own kind and a linear projection (as in MoCa, arXiv
    2506.23115).

    It predicts one frame for each hidden visual token: the temporal copy of a still image is
    redundant.

    Args:
        backbone: lends the kind of layer, not its weights; not registered as a submodule.
        patch_values: values of one patch of one frame (channels x side x side).
    """

    def __init__(self, backbone: Backbone, *, patch_values: int) -> None:
        super().__init__()
        self.layer = backbone.decoder_layer()
        self.projection = nn.Linear(backbone.hidden_size, patch_values * backbone.merge_size**2)

    def forward(self, backbone: Backbone, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states (T, D) to the normalised pixels (N, merge_size ** 2 * B) of the batch's
        hidden visual tokens.
        """
        with backbone.autocast():
            states = backbone.run_layer(self.layer, hidden, batch)
            return self.projection(states.index_select(0, batch.patch_rows))
