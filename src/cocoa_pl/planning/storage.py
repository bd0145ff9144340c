"""Bytes on disk and in the host's memory."""

from __future__ import annotations

from cocoa_pl.planning.activations import FLOAT32
from cocoa_pl.planning.memory import Setup
from cocoa_pl.planning.samples import Lengths
from cocoa_pl.planning.tuning import decoder_parameters, trained_parameters

GPUS_PER_HOST = 8
BATCHES_AHEAD = 2  # of each worker: torch's prefetch_factor
TOKEN_BYTES = 34  # id, three positions, two masks


def disk(setup: Setup, lengths: Lengths, *, rows: int | None, decoder: bool) -> dict[str, int]:
    """Bytes on disk: the model that is started from, images, checkpoints, the exported model.

    Args:
        rows: of the training data; None leaves the images out.
        decoder: some stage trains the image decoder.
    """
    own = setup.shape.parameters
    trained = trained_parameters(setup.shape, setup.tuning)
    heads = decoder_parameters(setup.shape) if decoder else 0
    found = {"model to start from": own * setup.width}
    if rows is not None:
        images = rows * (lengths.images_per_query + lengths.images_per_positive)
        found["images"] = int(images * lengths.image_bytes)
    # Weights and both moments; the new file is whole before the old one goes.
    found["checkpoints"] = 2 * 3 * (trained + heads) * FLOAT32
    found["exported model"] = own * setup.width  # rounded to what the model computes in
    return found


def host_memory(
    setup: Setup,
    lengths: Lengths,
    *,
    rows: int | None,
    workers: int,
    batch_tokens: int,
    batch_patches: int,
) -> dict[str, int]:
    """Bytes of one host with up to eight GPUs.

    Args:
        rows: of the training data; None leaves them out.
        workers: of each process.
        batch_tokens, batch_patches: of one step on one process.
    """
    processes = min(setup.gpus, GPUS_PER_HOST)
    found = {"models while loading": processes * setup.shape.parameters * setup.weight_width}
    if rows is not None:
        found["rows"] = processes * rows * lengths.row_bytes  # workers share their process's
    patch = setup.shape.vision.patch_values // 2
    batch = batch_tokens * TOKEN_BYTES + batch_patches * patch
    found["batches ahead"] = processes * max(1, workers * BATCHES_AHEAD) * batch
    return found
