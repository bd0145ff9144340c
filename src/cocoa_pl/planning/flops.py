"""Floating-point operations of a chunk, by part.

A matrix product of n rows costs 2 x n x fan_in x fan_out. Norms, rotations, activations and the
optimizer are left out, as torch's FlopCounterMode does; all formulas are in docs/plan.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cocoa_pl.planning.shapes import BlockShape, Linear, MergerShape, ModelShape
from cocoa_pl.planning.tuning import FULL, Tuning, decoder_values
from cocoa_pl.planning.work import Attention, Work

VISION, TEXT, SCORES = "vision tower", "language model", "attention scores"
ADAPTERS, HEAD, DECODER = "adapters", "vocabulary head", "image decoder"
SIMILARITY = "similarities"
PARTS = (VISION, TEXT, SCORES, ADAPTERS, HEAD, DECODER, SIMILARITY)
ALWAYS_FLOAT32 = (SIMILARITY,)


@dataclass(frozen=True)
class Cost:
    """Operations of one part."""

    forward: float = 0
    backward: float = 0
    recomputed: float = 0  # forward again, under gradient checkpointing
    cached: float = 0  # the gradient cache's first pass, without a graph

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
            self.cached + other.cached,
        )

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed + self.cached


Costs = dict[str, Cost]


@dataclass
class _Tape:
    """Costs that add up along a forward pass; methods return if their output needs a gradient."""

    tuning: Tuning
    costs: Costs = field(default_factory=dict)

    def add(self, part: str, cost: Cost) -> None:
        self.costs[part] = self.costs.get(part, Cost()) + cost

    def linear(
        self, part: str, linear: Linear, rows: int, *, block: int, requires_grad: bool, again: bool
    ) -> bool:
        """Charge one linear; True if its output needs a gradient.

        Args:
            requires_grad: its input needs a gradient.
            again: it is recomputed under checkpointing.
        """
        product = 2.0 * rows * linear.fan_in * linear.fan_out
        backward = product * (requires_grad + self.tuning.full)
        self.add(part, Cost(product, backward, product * again))
        if self.tuning.adapts(linear, block):
            self._adapter(linear, rows, product, requires_grad=requires_grad)
        return requires_grad or self.tuning.learns(linear, block)

    def _adapter(self, linear: Linear, rows: int, product: float, *, requires_grad: bool) -> None:
        adapter = self.tuning.adapter
        assert adapter is not None
        pairs = 2.0 * rows * adapter.rank
        down, up = pairs * linear.fan_in, pairs * linear.fan_out
        forward, backward = down + up, down * (1 + requires_grad) + 2 * up
        if adapter.use_dora:
            if not adapter.lean:  # peft builds B A from an identity matrix for the norm of W + B A
                matrix = 2.0 * linear.fan_in * adapter.rank
                forward += matrix * (linear.fan_in + linear.fan_out)
            if adapter.dropout and adapter.dropout_on_base:
                forward += product
                backward += product * requires_grad
        self.add(ADAPTERS, Cost(forward, backward))


def chunk_costs(
    shape: ModelShape, tuning: Tuning, work: Work, *, checkpointing: bool, decoder: bool
) -> Costs:
    """Forward and backward of one chunk, by part.

    Args:
        checkpointing: blocks of both towers are computed a second time in the backward pass.
        decoder: the image decoder runs.
    """
    tape = _Tape(tuning)
    requires_grad = _vision(tape, shape, work, checkpointing) if work.patches else False
    requires_grad = requires_grad or tuning.full or checkpointing
    for number in range(shape.text.count):
        requires_grad = _block(
            tape,
            TEXT,
            shape.text,
            number,
            work.tokens,
            work.text,
            requires_grad=requires_grad,
            checkpointing=checkpointing,
        )
    vocabulary = 2.0 * work.predicted * shape.text.width * shape.vocabulary
    tape.add(HEAD, Cost(vocabulary, vocabulary * (requires_grad + tuning.full)))
    if decoder:
        tape.add(DECODER, _decoder(shape, work))
    return tape.costs


def similarity_costs(width: int, *, queries: int, candidates: int) -> Costs:
    """InfoNCE of one rank's queries against the candidates of all ranks."""
    product = 2.0 * queries * candidates * width
    return {SIMILARITY: Cost(product, 2 * product)}


def norm_costs(shape: ModelShape, tuning: Tuning) -> Costs:
    """DoRA's norms where they are taken once a step: B A of every adapted linear."""
    adapter = tuning.adapter
    if adapter is None or not (adapter.use_dora and adapter.lean):
        return {}
    blocks = (shape.text, shape.vision.block)
    linears = [
        (linear, number)
        for block in blocks
        for number in range(block.count)
        for linear in block.linears
    ]
    mergers = [(one, 0) for m in shape.vision.mergers for one in (m.first, m.second)]
    return {
        ADAPTERS: Cost(
            sum(
                2.0 * adapter.rank * linear.fan_in * linear.fan_out
                for linear, number in (*linears, *mergers)
                if adapter.adapts(linear, number)
            )
        )
    }


def without_graph(costs: Costs) -> Costs:
    """The same forward pass in the gradient cache's first round."""
    return {part: Cost(cached=cost.forward) for part, cost in costs.items()}


def total(costs: Sequence[Costs]) -> Costs:
    """Sum by part, in the order of `PARTS`."""
    return {
        part: sum((cost[part] for cost in costs if part in cost), Cost())
        for part in PARTS
        if any(part in cost for cost in costs)
    }


def _vision(tape: _Tape, shape: ModelShape, work: Work, checkpointing: bool) -> bool:
    vision, tuning = shape.vision, tape.tuning
    embedding = 2.0 * work.patches * vision.patch_values * vision.block.width
    tape.add(VISION, Cost(embedding, embedding * tuning.full))
    requires_grad = tuning.full or (checkpointing and vision.input_hook)
    for number in range(vision.block.count):
        # Where windows are, the blocks that see whole images cost the same wherever they stand.
        whole = number < vision.full_blocks
        requires_grad = _block(
            tape,
            VISION,
            vision.block,
            number,
            work.patches,
            work.images if whole else work.windows,
            requires_grad=requires_grad,
            checkpointing=checkpointing,
        )
    merged = [_merger(tape, merger, work.visual_tokens, requires_grad) for merger in vision.mergers]
    return any(merged)


def _block(
    tape: _Tape,
    part: str,
    block: BlockShape,
    number: int,
    rows: int,
    attention: Attention,
    *,
    requires_grad: bool,
    checkpointing: bool,
) -> bool:
    """Charge one transformer block; True if its output needs a gradient."""
    before = tape.costs.get(ADAPTERS, Cost())

    def linear(one: Linear, requires_grad: bool, again: bool = checkpointing) -> bool:
        return tape.linear(part, one, rows, block=number, requires_grad=requires_grad, again=again)

    attends = any([linear(one, requires_grad) for one in block.inputs])
    scores = attention_flops(block, attention)
    # Backward: the scores again, and gradients of values, scores, queries and keys.
    tape.add(SCORES, Cost(scores, 2.5 * scores * attends, scores * checkpointing))
    requires_grad = linear(block.output, attends) or requires_grad
    raised = any([linear(one, requires_grad) for one in block.up])
    # Recomputation stops at the last tensor that backward asks for: the input of the last product.
    redone = checkpointing and _last_is_redone(tape.tuning, block.down, number)
    requires_grad = linear(block.down, raised, redone) or requires_grad
    if checkpointing and ADAPTERS in tape.costs:
        forward = tape.costs[ADAPTERS].forward - before.forward
        tape.add(ADAPTERS, Cost(recomputed=forward - _not_redone(tape.tuning, block, number, rows)))
    return requires_grad


def _last_is_redone(tuning: Tuning, last: Linear, number: int) -> bool:
    return tuning.adapts(last, number)  # its adapter's inputs come after the product


def _not_redone(tuning: Tuning, block: BlockShape, number: int, rows: int) -> float:
    adapter = tuning.adapter
    if adapter is None or adapter.use_dora or not tuning.adapts(block.down, number):
        return 0.0
    return 2.0 * rows * adapter.rank * block.down.fan_out


def attention_flops(block: BlockShape, attention: Attention) -> float:
    """Scores and their product with the values, of all heads."""
    return 4.0 * attention.scores * block.heads * block.head_dim


def _merger(tape: _Tape, merger: MergerShape, rows: int, requires_grad: bool) -> bool:
    for linear in (merger.first, merger.second):
        requires_grad = tape.linear(
            VISION, linear, rows, block=0, requires_grad=requires_grad, again=False
        )
    return requires_grad


def _decoder(shape: ModelShape, work: Work) -> Cost:
    """One block of the language model's kind over all tokens, and the projection of hidden visual
    tokens; it trains whole and is not checkpointed.
    """
    tape, block = _Tape(FULL), shape.text
    _block(tape, TEXT, block, 0, work.tokens, work.text, requires_grad=True, checkpointing=False)
    projection = 2.0 * work.rebuilt * shape.text.width * decoder_values(shape)
    return sum(tape.costs.values(), Cost(projection, 2 * projection))
