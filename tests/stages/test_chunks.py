"""What the workers hand to a step: every sample once, laid out, and what is asked about it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Encoded, Rows, pack
from cocoa_pl.corruption import Corrupted, Corruption, with_noise
from cocoa_pl.data.datamodule import collate
from cocoa_pl.data.items import Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.models.loading import FAMILIES, Loaded
from cocoa_pl.stages.bridge import exchange_contexts
from cocoa_pl.stages.chunks import Puzzle, ToEmbed, ToRebuild

ALL = ("context", "eos", "target")
FULL = Policy("bidirectional", ALL, ALL, ALL, causal=False)
BRIDGE = Policy("eos_bridge", ("context", "eos"), ALL, ("eos", "target"), causal=False)
MASK = 300
WARMUP = Corruption(
    text_ratio=0.3, text_segment="context", patch_ratio=0.5, mask_token_id=MASK, merge_size=2
)
REBUILD = Corruption(
    text_ratio=0.7, text_segment="target", patch_ratio=0.0, mask_token_id=MASK, merge_size=2
)
Encode = Callable[..., Encoded]


@pytest.fixture(scope="module")
def encode(processor: Processor, make_item: Callable[..., Item]) -> Encode:
    def one(seed: int, images: int, *, target: bool = False) -> Encoded:
        item = make_item(seed, images=images)
        text = make_item(90 + seed).text if target else None
        return processor.encode(item, text, key=item.key, seed=seed, row_id=f"row {seed}")

    return one


@pytest.fixture(scope="module")
def pairs(encode: Encode) -> Rows:
    return collate([[encode(n, n % 3), encode(20 + n, 0)] for n in range(7)])


@pytest.fixture(scope="module")
def captions(encode: Encode) -> Rows:
    return collate([[encode(n, n % 3, target=True)] for n in range(7)])


def rebuild(loaded: Loaded, corruption: Corruption, *, exchanging: bool = False) -> ToRebuild:
    layouts = loaded.backbone.layouts(BRIDGE)
    return ToRebuild(corruption, exchanging=exchanging, layouts=layouts, token_budget=60)


# --- Samples to embed ------------------------------------------------------------------------


@pytest.mark.parametrize("token_budget", [1, 50, 10_000])
def test_chunks_hold_every_sample_once_and_order_finds_it(
    token_budget: int, loaded: Loaded, pairs: Rows
) -> None:
    step = ToEmbed(loaded.backbone.layouts(FULL), token_budget=token_budget)(pairs)
    keys = torch.cat([chunk.batch.keys for chunk in step.chunks])
    assert torch.equal(keys[step.order], pairs.batch.keys)
    assert torch.equal(step.keys, pairs.batch.keys)
    assert step.num_rows == 7
    assert step.num_tokens == pairs.batch.num_tokens
    assert step.row_ids == tuple(f"row {n}" for n in range(7))


def test_texts_come_last_and_wait_for_no_image(loaded: Loaded, pairs: Rows) -> None:
    step = ToEmbed(loaded.backbone.layouts(FULL), token_budget=40)(pairs)
    images = [int(chunk.batch.images_per_sample.sum()) for chunk in step.chunks]
    assert images == sorted(images, reverse=True)
    assert images.count(0) > 1
    assert all(not chunk.layout.vision for chunk in step.chunks if not len(chunk.batch.grids))


def test_layout_says_where_eos_and_visual_tokens_are(
    loaded: Loaded, pairs: Rows, processor: Processor
) -> None:
    step = ToEmbed(loaded.backbone.layouts(FULL), token_budget=60)(pairs)
    for chunk in step.chunks:
        ids = chunk.batch.input_ids
        assert ids[chunk.layout.eos_rows].unique().tolist() == [processor.eos_id]
        assert len(chunk.layout.eos_rows) == chunk.batch.num_samples
        wanted = (ids == processor.image_id).nonzero()[:, 0]
        assert torch.equal(chunk.layout.visual_rows, wanted)


# --- Puzzles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", [WARMUP, REBUILD], ids=["warmup", "reconstruct"])
def test_puzzles_ask_for_what_is_hidden(
    corruption: Corruption, loaded: Loaded, captions: Rows
) -> None:
    step = rebuild(loaded, corruption)(captions)
    assert len(step.chunks) > 2
    for puzzle in step.chunks:
        seen = puzzle.seen
        assert puzzle.batch is seen.batch
        hidden = puzzle.states + 1
        assert puzzle.batch.input_ids[hidden].unique().tolist() == [MASK]
        assert torch.equal(puzzle.targets, seen.labels[hidden])
        assert len(hidden) == int((puzzle.batch.input_ids == MASK).sum())
        visual = puzzle.batch.image_mask.nonzero()[:, 0]
        assert torch.equal(puzzle.visual_rows, visual[puzzle.visual_places])
        patches = puzzle.visual_places[:, None] * 4 + torch.arange(4)
        assert torch.equal(puzzle.noise.rows, patches.flatten())


def test_puzzles_do_not_depend_on_how_the_batch_is_cut(loaded: Loaded, captions: Rows) -> None:
    def by_sample(token_budget: int) -> dict[int, tuple[list[int], list[int], Tensor]]:
        prepare = rebuild(loaded, WARMUP)
        prepare.token_budget = token_budget
        found = {}
        for puzzle in prepare(captions).chunks:
            pixels = with_noise(puzzle.batch.patches.float(), puzzle.noise)
            counts = puzzle.batch.lengths.tolist()
            for sample, (ids, labels, picture) in enumerate(
                zip(
                    puzzle.batch.input_ids.split(counts),
                    puzzle.seen.labels.split(counts),
                    pixels.split(puzzle.batch.patches_per_sample.tolist()),
                    strict=True,
                )
            ):
                key = int(puzzle.batch.keys[sample])
                found[key] = (ids.tolist(), labels.tolist(), picture)
        return found

    whole, cut = by_sample(10_000), by_sample(1)
    assert whole.keys() == cut.keys()
    for key, (ids, labels, picture) in whole.items():
        assert cut[key][:2] == (ids, labels)
        assert torch.equal(cut[key][2], picture)


# --- Other contexts --------------------------------------------------------------------------


def exchanged_one_by_one(seen: Corrupted) -> list[tuple[list[int], list[int], list[bool]]]:
    """The slow twin: ids, labels and hidden tokens of each sample."""
    counts = seen.batch.lengths.tolist()
    ids, labels, hidden = (
        [part.tolist() for part in values.split(counts)]
        for values in (seen.batch.input_ids, seen.labels, seen.token_mask)
    )
    contexts = seen.batch.segment_lengths[:, 0].tolist()
    found = []
    for own in range(len(counts)):
        donor = (own - 1) % len(counts)
        a, b = contexts[donor], contexts[own]
        found.append(
            tuple(part[donor][:a] + part[own][b:] for part in (ids, labels, hidden))  # type: ignore[arg-type]
        )
    return found  # type: ignore[return-value]


def test_exchanged_samples_have_the_context_of_the_one_before(captions: Rows) -> None:
    seen = REBUILD(captions.batch)
    other = exchange_contexts(seen)
    counts = other.batch.lengths.tolist()
    found = list(
        zip(
            *(
                [part.tolist() for part in values.split(counts)]
                for values in (other.batch.input_ids, other.labels, other.token_mask)
            ),
            strict=True,
        )
    )
    assert found == exchanged_one_by_one(seen)
    donors = torch.arange(7).roll(1)
    patches = captions.batch.patches.split(captions.batch.patches_per_sample.tolist())
    assert torch.equal(other.batch.patches, torch.cat([patches[n] for n in donors]))
    images = captions.batch.images_per_sample[donors]
    assert torch.equal(other.batch.images_per_sample, images)


def test_eos_and_target_keep_their_distance_to_the_end_of_context(
    encode: Encode, processor: Processor, make_item: Callable[..., Item]
) -> None:
    """As if the sample had been encoded with that context."""
    samples = [encode(n, n % 3, target=True) for n in range(4)]
    other = exchange_contexts(REBUILD(pack(samples)))
    for own, positions in enumerate(
        other.batch.position_ids.split(other.batch.lengths.tolist(), dim=1)
    ):
        donor = (own - 1) % 4
        item, text = make_item(donor, images=donor % 3), make_item(90 + own).text
        wanted = processor.encode(item, text, key=0, seed=0, row_id="toy")
        assert torch.equal(positions, wanted.position_ids)


def test_other_contexts_are_made_for_validation_only_and_not_for_a_row_alone(
    loaded: Loaded, captions: Rows, encode: Encode
) -> None:
    assert rebuild(loaded, REBUILD)(captions).others == ()
    measured = rebuild(loaded, REBUILD, exchanging=True)
    step = measured(captions)
    assert sum(p.batch.num_samples for p in step.others) == 7
    asked = [
        sorted(torch.cat([p.targets for p in ps]).tolist()) for ps in (step.chunks, step.others)
    ]
    assert asked[0] == asked[1]
    assert measured(collate([[encode(1, 1, target=True)]])).others == ()


# --- Travelling ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")
def test_a_preparation_is_small_and_survives_pickling(
    loaded: Loaded, make_samples: Callable[..., list[Encoded]], family: str
) -> None:
    prepare = ToEmbed(loaded.backbone.layouts(FULL), token_budget=100)
    packed = pickle.dumps(prepare)
    assert len(packed) < 2000
    rows = collate([[sample] for sample in make_samples((1, 0, 2))])
    (before,), (after,) = prepare(rows).chunks, pickle.loads(packed)(rows).chunks
    with torch.no_grad():
        vectors = [loaded.backbone.embed(c.batch, c.layout) for c in (before, after)]
    assert torch.equal(*vectors)


def test_a_moved_chunk_leaves_its_bookkeeping_on_the_host(loaded: Loaded, captions: Rows) -> None:
    puzzle: Puzzle = rebuild(loaded, WARMUP)(captions).chunks[0]
    moved: Any = puzzle.to(torch.device("meta"))
    assert moved.seen is puzzle.seen
    assert moved.seen.batch.input_ids.device.type == "cpu"
    for name in ("states", "targets", "visual_rows", "visual_places"):
        assert getattr(moved, name).device.type == "meta", name
    assert moved.batch.patches.device.type == moved.noise.rows.device.type == "meta"
    assert moved.layout.eos_rows.device.type == "meta"
    assert moved.batch.segment_lengths.device.type == "cpu"
