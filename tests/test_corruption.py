"""What is hidden: exactly as much as asked, never what must stay, and by the seed alone."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from cocoa_pl.batch import Batch, Encoded, pack
from cocoa_pl.corruption import (
    Corruption,
    choose_patches,
    every_next_token,
    hide_text,
    hideable_text,
    join_corrupted,
    noise_of,
    untouched,
    with_noise,
)
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.randomness import mix, uniform

MASK = 323
IMAGES = (1, 0, 2, 0, 1, 1)
MakeSamples = Callable[..., list[Encoded]]


@pytest.fixture
def samples(make_samples: MakeSamples) -> list[Encoded]:
    return make_samples(IMAGES, targets=True)


def text_sample(seed: int, *, context: int, target: int) -> Encoded:
    tokens = context + 1 + target
    return Encoded(
        input_ids=torch.arange(10, 10 + tokens),
        position_ids=torch.arange(tokens).expand(3, -1),
        text_mask=torch.arange(tokens) != context,
        image_mask=torch.zeros(tokens, dtype=torch.bool),
        segment_lengths=(context, 1, target),
        patches=torch.empty(0, 588, dtype=torch.uint8),
        grids=torch.empty(0, 3, dtype=torch.int64),
        key=0,
        seed=mix(seed),
        row_id="toy",
    )


def image_sample(seed: int, *, height: int, width: int) -> Encoded:
    tokens = height * width
    generator = torch.Generator().manual_seed(seed)
    text = text_sample(seed, context=tokens, target=0)
    return dataclasses.replace(
        text,
        text_mask=torch.zeros(tokens + 1, dtype=torch.bool),
        image_mask=torch.arange(tokens + 1) < tokens,
        patches=torch.randint(0, 256, (4 * tokens, 588), generator=generator, dtype=torch.uint8),
        grids=torch.tensor([[1, 2 * height, 2 * width]]),
    )


def hide(batch: Batch, *, ratio: float = 0.7, segment: str = "target") -> tuple[Batch, Tensor]:
    return hide_text(batch, ratio=ratio, segment=segment, mask_token_id=MASK)


def hide_pixels(batch: Batch, pixels: Tensor, *, ratio: float) -> tuple[Tensor, Tensor]:
    patch_mask = choose_patches(batch, ratio=ratio)
    return with_noise(pixels, noise_of(batch, patch_mask, merge_size=2)), patch_mask


def floats(batch: Batch) -> Tensor:
    return batch.patches.float() / 255 + 10  # no value that noise would take


def exact_share(ratio: float, count: int) -> int:
    """The nearest whole number, halves upwards, at least one of those that there are."""
    rounded = math.floor(Fraction(str(ratio)) * count + Fraction(1, 2))
    return min(count, max(1, rounded))


# --- Text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("segment", ["context", "target"])
def test_exactly_the_ratio_is_hidden_in_every_sample(ratio: float, segment: str) -> None:
    batch = pack([text_sample(n, context=n, target=n) for n in range(130)])
    _, token_mask = hide(batch, ratio=ratio, segment=segment)
    hidden = [int(m.sum()) for m in token_mask.split(batch.lengths.tolist())]
    # A sample's first token has no state before it: with a CONTEXT, that is a CONTEXT token.
    eligible = [max(0, n - 1) if segment == "context" else n for n in range(130)]
    assert hidden == [exact_share(ratio, n) for n in eligible]


@pytest.mark.parametrize("segment", ["context", "target"])
def test_only_ordinary_text_of_the_segment_is_ever_hidden(
    segment: str, samples: list[Encoded], processor: Processor
) -> None:
    batch = pack(samples)
    corrupted, token_mask = hide(batch, ratio=1.0, segment=segment)
    starts = batch.lengths.cumsum(0) - batch.lengths
    specials = [processor.eos_id, processor.vision_start_id, processor.vision_end_id]
    assert not torch.isin(batch.input_ids[token_mask], torch.tensor(specials)).any()
    assert not (token_mask & batch.image_mask).any()
    assert not token_mask[starts].any()
    assert not token_mask[batch.eos_positions].any()
    inside = torch.zeros(batch.num_tokens, dtype=torch.bool)
    for start, (context, eos, target) in zip(
        starts.tolist(), batch.segment_lengths.tolist(), strict=True
    ):
        first = start if segment == "context" else start + context + eos
        inside[first : first + (context if segment == "context" else target)] = True
    inside[starts] = False
    assert torch.equal(token_mask, inside & batch.text_mask)
    assert torch.equal(token_mask, hideable_text(batch, segment))
    assert (corrupted.input_ids[token_mask] == MASK).all()
    assert torch.equal(corrupted.input_ids[~token_mask], batch.input_ids[~token_mask])


def test_first_target_token_can_be_hidden_because_eos_precedes_it() -> None:
    batch = pack([text_sample(0, context=0, target=3)])
    assert hideable_text(batch, "target").tolist() == [False, True, True, True]


def test_choice_equals_its_slow_twin(samples: list[Encoded]) -> None:
    batch = pack(samples)
    _, token_mask = hide(batch, ratio=0.5, segment="context")
    eligible = hideable_text(batch, "context").split(batch.lengths.tolist())
    expected = []
    for sample, allowed in zip(samples, eligible, strict=True):
        places = allowed.nonzero()[:, 0].tolist()
        draws = {
            p: float(uniform(torch.tensor(sample.seed), torch.tensor(p), stream=1)) for p in places
        }
        chosen = sorted(places, key=draws.__getitem__)[: exact_share(0.5, len(places))]
        expected.append(
            torch.zeros(len(allowed), dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)
        )
    assert torch.equal(token_mask, torch.cat(expected))


def test_every_position_is_hidden_equally_often() -> None:
    runs, tokens = 4000, 10
    batch = pack([text_sample(seed, context=0, target=tokens) for seed in range(runs)])
    _, token_mask = hide(batch, ratio=0.3)
    frequency = token_mask.view(runs, tokens + 1)[:, 1:].float().mean(0)
    assert (frequency - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / runs)


def test_other_seed_hides_other_tokens() -> None:
    first, second = (hide(pack([text_sample(seed, context=0, target=60)]))[1] for seed in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("segment", ["context", "target"])
def test_hidden_text_depends_on_the_seed_and_not_on_packing(
    segment: str, samples: list[Encoded]
) -> None:
    alone = [hide(pack([sample]), segment=segment)[1] for sample in samples]
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 1, 4, 3], [3, 3, 1]):
        together = hide(pack([samples[i] for i in order]), segment=segment)[1]
        assert torch.equal(together, torch.cat([alone[i] for i in order]))


def test_next_token_prediction_asks_for_all_text_and_the_end_token(
    samples: list[Encoded],
) -> None:
    batch = pack(samples)
    token_mask = every_next_token(batch)
    expected = batch.text_mask.clone()
    expected[batch.lengths.cumsum(0) - batch.lengths] = False
    expected[batch.eos_positions] = True
    assert torch.equal(token_mask, expected)


def test_next_token_prediction_never_asks_for_a_first_token() -> None:
    batch = pack([text_sample(0, context=3, target=0), text_sample(1, context=1, target=0)])
    assert every_next_token(batch).tolist() == [False, True, True, True, False, True]


# --- Patches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_exactly_the_ratio_of_visual_tokens_is_hidden(ratio: float) -> None:
    shapes = [(1, 1), (1, 2), (2, 2), (3, 1), (3, 3), (4, 5), (7, 7)]
    batch = pack([image_sample(i, height=h, width=w) for i, (h, w) in enumerate(shapes)])
    _, patch_mask = hide_pixels(batch, floats(batch), ratio=ratio)
    hidden = [int(m.sum()) for m in patch_mask.split(batch.lengths.tolist())]
    assert hidden == [exact_share(ratio, h * w) for h, w in shapes]
    assert not (patch_mask & ~batch.image_mask).any()


def test_hidden_visual_tokens_become_noise_and_the_others_stay(samples: list[Encoded]) -> None:
    batch = pack(samples)
    pixels = floats(batch)
    noisy, patch_mask = hide_pixels(batch, pixels, ratio=0.5)
    hidden = patch_mask[batch.image_mask].repeat_interleave(4)
    assert torch.equal(noisy[~hidden], pixels[~hidden])
    assert (noisy[hidden] != pixels[hidden]).all()


def test_noise_is_standard_normal_and_never_repeats() -> None:
    batch = pack([image_sample(seed, height=4, width=4) for seed in range(12)])
    noise, _ = hide_pixels(batch, floats(batch), ratio=1.0)
    n = noise.numel()
    assert abs(float(noise.double().mean())) < 4 / math.sqrt(n)
    assert abs(float(noise.double().var()) - 1) < 4 * math.sqrt(2 / n)
    correlations = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlations.abs().max() < 6 / math.sqrt(noise.shape[1])


def test_hidden_patches_depend_on_the_seed_and_not_on_packing(samples: list[Encoded]) -> None:
    alone = []
    for sample in samples:
        batch = pack([sample])
        alone.append(hide_pixels(batch, floats(batch), ratio=0.5))
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 1, 4, 3], [1, 3]):
        batch = pack([samples[i] for i in order])
        noisy, patch_mask = hide_pixels(batch, floats(batch), ratio=0.5)
        assert torch.equal(noisy, torch.cat([alone[i][0] for i in order]))
        assert torch.equal(patch_mask, torch.cat([alone[i][1] for i in order]))


def test_text_and_patches_of_one_seed_are_chosen_independently() -> None:
    runs = 60
    text = [text_sample(seed, context=0, target=16) for seed in range(runs)]
    images = [image_sample(seed, height=4, width=4) for seed in range(runs)]
    _, token_mask = hide(pack(text), ratio=0.5)
    _, patch_mask = hide_pixels(pack(images), floats(pack(images)), ratio=0.5)
    # Positions 1 to 15 hold a candidate in both.
    same = token_mask.view(runs, 17)[:, 1:16] == patch_mask.view(runs, 17)[:, 1:16]
    assert abs(float(same.float().mean()) - 0.5) < 4 * 0.5 / math.sqrt(15 * runs)


def test_corruption_returns_new_values_and_keeps_the_dtype(samples: list[Encoded]) -> None:
    batch, untouched = pack(samples), pack(samples)
    pixels = floats(batch).bfloat16()
    noisy, _ = hide_pixels(batch, pixels, ratio=0.5)
    corrupted, _ = hide(batch)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(pixels, floats(untouched).bfloat16())
    assert torch.equal(batch.input_ids, untouched.input_ids)
    assert corrupted.patches is batch.patches


# --- Both ------------------------------------------------------------------------------------

WARMUP = Corruption(
    text_ratio=0.3, text_segment="context", patch_ratio=0.5, mask_token_id=MASK, merge_size=2
)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 2, 0], [3]])
def test_corrupted_samples_taken_are_those_corrupted_alone(
    order: list[int], samples: list[Encoded]
) -> None:
    taken = WARMUP(pack(samples)).take(torch.tensor(order))
    alone = WARMUP(pack([samples[place] for place in order]))
    assert torch.equal(taken.batch.input_ids, alone.batch.input_ids)
    for name in ("labels", "token_mask", "patch_mask"):
        assert torch.equal(getattr(taken, name), getattr(alone, name)), name


def test_of_a_batch_that_is_joined_untouched_nothing_is_asked(samples: list[Encoded]) -> None:
    first, second = pack(samples[:3]), pack(samples[3:])
    joined = join_corrupted([WARMUP(first), untouched(second)])
    alone = WARMUP(first)
    for name in ("token_mask", "patch_mask"):
        own, others = getattr(joined, name).split([first.num_tokens, second.num_tokens])
        assert torch.equal(own, getattr(alone, name))
        assert not others.any()
    assert torch.equal(joined.labels, pack(samples).input_ids)
    assert torch.equal(joined.batch.input_ids[first.num_tokens :], second.input_ids)
