"""The two types between a row and a loss: `Sample`, one sequence, and `Batch`, packed samples.

Shape legend: T tokens, S samples, k tokens of a BOTTLENECK, V visual tokens, I images, P patches,
B bytes of one patch (channels x side x side), M hidden text tokens, N hidden visual tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from numpy.typing import NDArray
from torch import Tensor

from cocoa_pl.attention.plan import Plan, on_device
from cocoa_pl.errors import UserError

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
Grid = tuple[int, int, int]  # frames x height x width of an image in patches

SPECIAL, TEXT, VISUAL = range(3)  # kinds of tokens
# Of a visual token beyond a text token: the vision tower computes for its four patches. On
# Qwen2-VL-2B it costs 3.2 text tokens in all; MoCa (arXiv 2506.23115) counts 4.
VISUAL_TOKEN_COST = 2

# Segment lengths (S, 3) and image grids (I, 3), on the CPU -> the plan of the language model, and
# the keywords of the vision tower: see `models.backbone.plan_batch`.
PlanBatch = Callable[[Tensor, Tensor], tuple[Plan, Mapping[str, Any]]]


def _nothing() -> Ints:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence as a data worker makes it: CONTEXT, BOTTLENECK and TARGET tokens in this order,
    with the patches of its images, and what is hidden of it.

    The processor *writes* the segment lengths; no code searches for EOS in `input_ids` later.
    """

    input_ids: Ints  # (t), the mask token where text is hidden
    kinds: NDArray[np.uint8]  # (t) SPECIAL, TEXT (which may be hidden) or VISUAL
    position_ids: Ints  # (3, t), M-RoPE: temporal, height, width
    segment_lengths: tuple[int, int, int]
    patches: NDArray[np.uint8]  # (p, B), one frame
    grids: tuple[Grid, ...]  # of each image
    key: int  # identity of the content: equal items share it
    row_id: str
    role: int = 0  # in its row: 0 query (or the only sample), 1 positive, 2 and more hard negatives
    pool: int = 0  # a number for the subset of its row
    # Written by `masking`.
    hidden: Ints = field(default_factory=_nothing)  # (m) places of tokens to predict
    targets: Ints = field(default_factory=_nothing)  # (m) what they were
    hidden_visual: Ints = field(default_factory=_nothing)  # (n) visual tokens to rebuild, of all v
    noise_seed: int = 0  # of the noise in their place

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def cost(self) -> int:
        """In text tokens."""
        return len(self.input_ids) + VISUAL_TOKEN_COST * int((self.kinds == VISUAL).sum())


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples packed end to end in a row of T tokens, no padding, with everything that a step
    reads.

    `to` moves what the model reads; what follows "On the host" stays on the CPU.
    """

    input_ids: Tensor  # (T) int64
    position_ids: Tensor  # (3, T) int64
    patches: Tensor  # (P, B) uint8
    visual_rows: Tensor  # (V) int64, tokens that the vision tower's output replaces
    bottleneck_rows: Tensor  # (S, k) int64
    token_rows: Tensor  # (M) int64, the states that hidden tokens are predicted from
    targets: Tensor  # (M) int64, the hidden tokens
    patch_rows: Tensor  # (N) int64, hidden visual tokens among all tokens
    patch_places: Tensor  # (N) int64, the same among visual tokens
    plan: Plan  # who attends to whom
    vision: Mapping[str, Any]  # keywords of the vision tower; empty without images
    # On the host:
    segment_lengths: Tensor  # (S, 3) int64
    grids: Tensor  # (I, 3) int64
    keys: Tensor  # (S) int64
    roles: Tensor  # (S) int64, see `Sample`
    pools: Tensor  # (S) int64, see `Sample`
    places: Tensor  # (S) int64, each sample's place in the step: all queries, all positives, ...
    noise: tuple[tuple[int, int], ...]  # of each sample with hidden visual tokens: seed, count
    row_ids: tuple[str, ...]
    exchanged: bool  # TARGETs stand behind other samples' CONTEXTs

    @property
    def num_samples(self) -> int:
        return len(self.row_ids)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_rows(self) -> int:
        """Dataset rows whose first sample is here."""
        return int((self.roles == 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch for a model on a device; from pinned memory nothing waits for the copy."""
        return self._with(on_device, device)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where a GPU fetches it by itself."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[..., Tensor], *arguments: Any) -> Batch:
        """The same batch with other tensors for the model, those of plans included."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _HOST}
        return replace(self, **apply_to_collection(moved, Tensor, change, *arguments))


# What stays as it is; `exchanged` is no tensor anyway.
_HOST = {"segment_lengths", "grids", "keys", "roles", "pools", "places", "noise", "row_ids"}


def pack(
    samples: Sequence[Sample],
    plan: PlanBatch,
    *,
    places: NDArray[np.intp] | None = None,
    exchanged: bool = False,
) -> Batch:
    """Lay samples end to end in their order.

    Args:
        samples: at least one; all with a BOTTLENECK of the same length.
        places: of the samples in the step; their order here if None.
    """
    segments = np.array([s.segment_lengths for s in samples], np.int64)  # (S, 3)
    lengths = segments.sum(1)
    starts = lengths.cumsum() - lengths  # of each sample's tokens
    kinds = np.concatenate([s.kinds for s in samples])
    visual_rows = np.flatnonzero(kinds == VISUAL)
    bottleneck = (starts + segments[:, 0])[:, None] + np.arange(segments[0, 1])
    hidden = [s.hidden + start for s, start in zip(samples, starts.tolist(), strict=True)]
    visual_starts = np.searchsorted(visual_rows, starts).tolist()
    patch_places = np.concatenate(
        [s.hidden_visual + start for s, start in zip(samples, visual_starts, strict=True)]
    )
    segment_lengths = torch.from_numpy(segments)
    grids = torch.tensor([g for s in samples for g in s.grids], dtype=torch.int64).view(-1, 3)
    text_plan, vision = plan(segment_lengths, grids)
    return Batch(
        input_ids=_joined([s.input_ids for s in samples]),
        position_ids=_joined([s.position_ids for s in samples], axis=1),
        patches=_joined([s.patches for s in samples]),
        visual_rows=torch.from_numpy(visual_rows),
        bottleneck_rows=torch.from_numpy(bottleneck),
        token_rows=_joined(hidden) - 1,
        targets=_joined([s.targets for s in samples]),
        patch_rows=torch.from_numpy(visual_rows[patch_places]),
        patch_places=torch.from_numpy(patch_places),
        plan=text_plan,
        vision=vision,
        segment_lengths=segment_lengths,
        grids=grids,
        keys=torch.tensor([s.key for s in samples]),
        roles=torch.tensor([s.role for s in samples]),
        pools=torch.tensor([s.pool for s in samples]),
        places=torch.arange(len(samples)) if places is None else torch.from_numpy(places),
        noise=tuple((s.noise_seed, len(s.hidden_visual)) for s in samples if len(s.hidden_visual)),
        row_ids=tuple(s.row_id for s in samples),
        exchanged=exchanged,
    )


def _joined(arrays: Sequence[NDArray[Any]], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays, axis=axis))


def cut_by_cost(
    tokens: NDArray[Any], costs: NDArray[Any], token_budget: int
) -> list[NDArray[np.intp]]:
    """Cut samples into pieces of at most `token_budget` tokens, the most expensive first (a longer
    single sample is a piece alone).

    Samples of about equal cost come together: texts do not wait for images, pieces are full, and
    attention pads little where it pads. Samples of equal cost keep their order.

    Args:
        tokens, costs: (S), of each sample.

    Returns:
        For each piece the samples in it; together each sample once.
    """
    order = np.argsort(-costs, kind="stable")
    starts, used = [0], 0
    for place, length in enumerate(tokens[order].tolist()):
        if place > starts[-1] and used + length > token_budget:
            starts.append(place)
            used = 0
        used += length
    return np.split(order, starts[1:])


@dataclass
class Collator:
    """What a data worker makes of a step's rows at last: batches, each within the token budget.

    Args:
        plan: of a batch's attention; from `Backbone.planner`.
        token_budget: tokens of a batch.
        exchange: add batches of the same samples behind other samples' contexts, with which the
            bridge gain is measured.
    """

    plan: PlanBatch
    token_budget: int
    exchange: bool = False

    def __call__(self, rows: Sequence[list[Sample] | UserError]) -> list[Batch]:
        """Batches of the samples of rows; a row that cannot be read is the reason why.

        Raises:
            UserError: if every row is bad.
        """
        good = [row for row in rows if not isinstance(row, UserError)]
        if bad := [row for row in rows if isinstance(row, UserError)]:
            if not good:
                raise UserError(f"no row of this batch can be read, first: {bad[0]}")
            log.warning("skipped %d bad rows, first: %s", len(bad), bad[0])
        # Role by role: all queries, all positives, then hard negatives.
        samples = sorted((sample for row in good for sample in row), key=lambda s: s.role)
        batches = self._batches(samples, exchanged=False)
        if self.exchange and len(samples) > 1:  # a sample alone has no other
            donors = [samples[-1], *samples[:-1]]
            lent = [with_context_of(s, donor) for s, donor in zip(samples, donors, strict=True)]
            batches += self._batches(lent, exchanged=True)
        return batches

    def _batches(self, samples: Sequence[Sample], *, exchanged: bool) -> list[Batch]:
        tokens = np.array([s.num_tokens for s in samples])
        pieces = cut_by_cost(tokens, np.array([s.cost for s in samples]), self.token_budget)
        return [
            pack([samples[n] for n in piece.tolist()], self.plan, places=piece, exchanged=exchanged)
            for piece in pieces
        ]


def with_context_of(sample: Sample, donor: Sample) -> Sample:
    """A sample's BOTTLENECK and TARGET behind another one's CONTEXT.

    What is hidden stays hidden, and positions keep their distance to the end of CONTEXT.
    """
    own, lent = sample.segment_lengths[0], donor.segment_lengths[0]
    shift = donor.position_ids[0, lent] - sample.position_ids[0, own]
    kept, given = sample.hidden >= own, donor.hidden < lent
    return replace(
        sample,
        input_ids=np.concatenate([donor.input_ids[:lent], sample.input_ids[own:]]),
        kinds=np.concatenate([donor.kinds[:lent], sample.kinds[own:]]),
        position_ids=np.concatenate(
            [donor.position_ids[:, :lent], sample.position_ids[:, own:] + shift], axis=1
        ),
        segment_lengths=(lent, *sample.segment_lengths[1:]),
        patches=donor.patches,
        grids=donor.grids,
        hidden=np.concatenate([donor.hidden[given], sample.hidden[kept] + lent - own]),
        targets=np.concatenate([donor.targets[given], sample.targets[kept]]),
        hidden_visual=donor.hidden_visual,
        noise_seed=donor.noise_seed,
    )
