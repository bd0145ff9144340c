"""Corrupted samples in, the same EOS and TARGETs behind other samples' CONTEXTs out: what the
bridge gain is measured with.
"""

from dataclasses import replace

import torch

from cocoa_pl.attention import ranges
from cocoa_pl.corruption import Corrupted


def exchange_contexts(seen: Corrupted) -> Corrupted:
    """Give each sample the CONTEXT of the sample before it (the first gets the last one's).

    Hidden tokens stay the ones that were hidden; EOS and TARGET keep their distance to the end of
    CONTEXT.
    """
    batch = seen.batch
    own = torch.arange(batch.num_samples)
    donors = own.roll(1)
    lengths, starts = batch.segment_lengths, batch.lengths.cumsum(0) - batch.lengths
    contexts, ends = lengths[:, 0], batch.eos_positions
    # Of each sample two pieces: the donor's CONTEXT, its own EOS and TARGET.
    sizes = torch.stack([contexts[donors], lengths[:, 1:].sum(1)], dim=1).flatten()
    index = ranges(torch.stack([starts[donors], ends], dim=1).flatten(), sizes)
    moved = batch.position_ids[0, ends[donors]] - batch.position_ids[0, ends]
    shift = torch.stack([torch.zeros_like(moved), moved], dim=1).flatten()
    lent = batch.take(donors)
    exchanged = replace(
        batch,
        input_ids=batch.input_ids[index],
        position_ids=batch.position_ids[:, index] + torch.repeat_interleave(shift, sizes),
        text_mask=batch.text_mask[index],
        image_mask=batch.image_mask[index],
        patches=lent.patches,
        seeds=lent.seeds,  # from here on only noise follows from them, which is in CONTEXT
        segment_lengths=torch.cat([lengths[donors, :1], lengths[:, 1:]], dim=1),
        grids=lent.grids,
        images_per_sample=lent.images_per_sample,
    )
    return Corrupted(exchanged, seen.labels[index], seen.token_mask[index], seen.patch_mask[index])
