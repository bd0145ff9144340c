"""A batch in, the same EOS and TARGETs behind other samples' CONTEXTs out: what the bridge gain is
measured with.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cocoa_pl.batch import Batch, ranges


def exchange_contexts(batch: Batch) -> tuple[Batch, Tensor, Tensor]:
    """Give each sample the CONTEXT of the sample before it (the first gets the last one's).

    Hidden tokens stay the ones that were hidden; EOS and TARGET keep their distance to the end of
    CONTEXT.

    Returns:
        The exchanged batch, and the indices (T) and (P) into the old tokens and patches that it was
        made from.
    """
    samples = torch.arange(batch.num_samples)
    real = batch.num_samples - batch.num_fillers
    donors = torch.cat([samples[:real].roll(1), samples[real:]])
    lengths = batch.segment_lengths
    starts = batch.lengths.cumsum(0) - batch.lengths
    tokens, shifts = [], []
    positions = batch.position_ids.cpu()
    for sample, donor in zip(samples.tolist(), donors.tolist(), strict=True):
        eos, other_eos = (int(starts[s] + lengths[s, 0]) for s in (sample, donor))
        tail = torch.arange(eos, int(starts[sample] + batch.lengths[sample]))
        tokens += [torch.arange(int(starts[donor]), other_eos), tail]
        shift = positions[0, other_eos] - positions[0, eos]
        shifts += [
            torch.zeros(other_eos - int(starts[donor]), dtype=torch.int64),
            shift.expand(len(tail)),
        ]

    index, shift = torch.cat(tokens), torch.cat(shifts).to(batch.position_ids.device)
    patch_starts = batch.patches_per_sample.cumsum(0) - batch.patches_per_sample
    image_starts = batch.images_per_sample.cumsum(0) - batch.images_per_sample
    patches = ranges(patch_starts[donors], batch.patches_per_sample[donors])
    images = ranges(image_starts[donors], batch.images_per_sample[donors])
    exchanged = replace(
        batch,
        input_ids=batch.input_ids[index],
        position_ids=batch.position_ids[:, index] + shift,
        text_mask=batch.text_mask[index],
        image_mask=batch.image_mask[index],
        patches=batch.patches[patches],
        segment_lengths=torch.cat([lengths[donors, :1], lengths[:, 1:]], dim=1),
        grids=batch.grids[images],
        images_per_sample=batch.images_per_sample[donors],
    )
    return exchanged, index, patches
