"""Masks have the exact ratio, spare special tokens, and depend on the generator alone."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from cocoa_pl.data.batch import TEXT, Batch, Sample
from cocoa_pl.data.datamodule import RowSamples, samples_of
from cocoa_pl.data.examples import PairExamples
from cocoa_pl.data.items import Item, Pair
from cocoa_pl.data.masking import Masking, with_noise
from cocoa_pl.data.processor import Processor

MASK = 323
IMAGES = (1, 0, 2, 0, 1, 1)
MakeSamples = Callable[..., list[Sample]]
SampleOf = Callable[..., Sample]
Packed = Callable[..., Batch]


@pytest.fixture
def samples(make_samples: MakeSamples) -> list[Sample]:
    return make_samples(IMAGES, targets=True)


def hide(
    sample: Sample,
    *,
    seed: int = 0,
    text: float | None = 0.7,
    segment: str = "target",
    patches: float = 0.0,
) -> Sample:
    masking = Masking(
        text_ratio=text, text_segment=segment, patch_ratio=patches, mask_token_id=MASK
    )
    return masking(sample, np.random.default_rng(seed))


def exact_share(ratio: float, count: int) -> int:
    """The nearest whole number, halves upwards, at least one of those that there are."""
    rounded = math.floor(Fraction(str(ratio)) * count + Fraction(1, 2))
    return min(count, max(1, rounded))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_exactly_the_ratio_is_hidden(ratio: float, sample_of: SampleOf) -> None:
    for n in range(70):
        # A sample's first token has no state before it: with a CONTEXT, that is a CONTEXT token.
        context = hide(sample_of(n, n), text=ratio, segment="context").hidden
        assert len(context) == exact_share(ratio, max(0, n - 1))
        assert len(hide(sample_of(n, n), text=ratio).hidden) == exact_share(ratio, n)
        visual = hide(sample_of(n, visual=n), patches=ratio).hidden_visual
        assert len(visual) == exact_share(ratio, n)
        assert len(set(visual.tolist()) & set(range(n))) == len(visual)


@pytest.mark.parametrize("segment", ["context", "target"])
def test_only_ordinary_text_of_the_segment_is_ever_hidden(
    segment: str, samples: list[Sample], sample_of: SampleOf
) -> None:
    for sample in (*samples, sample_of(0, 3)):
        masked = hide(sample, text=1.0, segment=segment)
        end = sample.segment_lengths[0]
        inside = range(1, end) if segment == "context" else range(end + 1, sample.num_tokens)
        assert masked.hidden.tolist() == [p for p in inside if sample.kinds[p] == TEXT]
        assert masked.targets.tolist() == sample.input_ids[masked.hidden].tolist()
        expected = sample.input_ids.copy()
        expected[masked.hidden] = MASK
        assert masked.input_ids.tolist() == expected.tolist()


def test_next_token_prediction_hides_nothing_and_asks_for_all_text_and_the_end_token(
    samples: list[Sample], sample_of: SampleOf, processor: Processor
) -> None:
    for sample in (*samples, sample_of(3), sample_of(0, 2)):
        found, end = hide(sample, text=None), sample.segment_lengths[0]
        asked = {*np.flatnonzero(sample.kinds == TEXT).tolist(), end} - {0}
        assert found.hidden.tolist() == sorted(asked)
        assert found.targets.tolist() == sample.input_ids[found.hidden].tolist()
        assert found.input_ids is sample.input_ids


def test_every_position_is_hidden_equally_often(sample_of: SampleOf) -> None:
    runs, sample, rng = 4000, sample_of(0, 10), np.random.default_rng(0)
    masking = Masking(text_ratio=0.3, text_segment="target", patch_ratio=0, mask_token_id=MASK)
    counts = np.bincount(np.concatenate([masking(sample, rng).hidden for _ in range(runs)]))
    assert np.abs(counts[1:] / runs - 0.3).max() < 4 * math.sqrt(0.3 * 0.7 / runs)


def test_the_mask_of_a_row_follows_from_seed_epoch_and_row(
    processor: Processor, make_item: Callable[..., Item]
) -> None:
    pairs = [Pair(make_item(n, images=1), make_item(n + 9), (), "toy", f"row {n}") for n in (0, 1)]
    make_row = partial(
        samples_of,
        make_samples=PairExamples(max_negatives=0),
        processor=processor,
        masking=Masking(
            text_ratio=0.5, text_segment="context", patch_ratio=0.5, mask_token_id=MASK
        ),
        on_bad_row="fail",
    )

    def drawn(seed: int, epoch: int, row: int) -> list[list[int]]:
        samples = RowSamples(pairs, make_row, seed=seed)[epoch, row]
        assert isinstance(samples, list)
        return [[*s.hidden, *s.hidden_visual, s.noise_seed] for s in samples]

    first = drawn(3, 5, 1)
    assert drawn(3, 5, 1) == first
    assert all(drawn(*other) != first for other in ((4, 5, 1), (3, 6, 1), (3, 5, 0)))


# --- Noise ------------------------------------------------------------------------------------


def noisy(batch: Batch) -> tuple[Tensor, Tensor]:
    """Pixels of a batch, with noise and before; none has a value that noise would take."""
    pixels = batch.patches.float() / 255 + 10
    return with_noise(pixels, batch, merge_size=2), pixels


def test_hidden_visual_tokens_become_noise_and_the_others_stay(
    samples: list[Sample], packed: Packed
) -> None:
    batch = packed([hide(sample, seed=n, patches=0.5) for n, sample in enumerate(samples)])
    state = torch.get_rng_state()
    found, pixels = noisy(batch)
    hidden = torch.zeros(len(batch.visual_rows), dtype=torch.bool)
    hidden[batch.patch_places] = True
    hidden = hidden.repeat_interleave(4)
    assert torch.equal((found != pixels).all(1), hidden)
    assert torch.equal(found[~hidden], pixels[~hidden])
    assert torch.equal(pixels, batch.patches.float() / 255 + 10)
    assert with_noise(pixels.bfloat16(), batch, merge_size=2).dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_standard_normal_and_never_repeats(sample_of: SampleOf, packed: Packed) -> None:
    samples = [hide(sample_of(16, visual=16), seed=n, patches=1.0) for n in range(12)]
    noise, _ = noisy(packed(samples))
    n = noise.numel()
    assert abs(float(noise.double().mean())) < 4 / math.sqrt(n)
    assert abs(float(noise.double().var()) - 1) < 4 * math.sqrt(2 / n)
    correlations = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlations.abs().max() < 6 / math.sqrt(noise.shape[1])
