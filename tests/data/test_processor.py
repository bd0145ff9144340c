"""Items become tokens: golden rows, truncation, and texts that look like special tokens.

Positions and pixels equal the stock model's: see `models/test_stock_parity.py`.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cocoa_pl.data.batch import SPECIAL, TEXT, VISUAL, Sample
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import Loaded

SLOT = IMAGE_SLOT
EOS, START, END, PAD = 2, 3, 4, 5  # <|im_end|>, <|vision_start|>, <|vision_end|>, <|image_pad|>
MakeImage = Callable[..., Image.Image]
MakeProcessor = Callable[..., Processor]


def process(
    processor: Processor, text: str, *images: Image.Image | Path, target: str | None = None
) -> Sample:
    return processor(Item(text, images), target, key=1, row_id="toy row 7", role=2)


@pytest.mark.parametrize(
    ("text", "sizes", "target", "ids", "segments", "grids"),
    [
        ("the red dog", [], None, [269, 287, 296, EOS], (3, 1, 0), ()),
        (
            *(f"{SLOT}\ntwo boats", [(56, 28)], "small cat"),
            [START, PAD, PAD, END, 205, 292, 295, EOS, 89, 301, 82, 285],
            *((7, 1, 4), ((1, 2, 4),)),
        ),
        (
            *(f"the {SLOT} and {SLOT}!", [(28, 28), (28, 56)], None),
            [269, 227, START, PAD, END, 294, 227, START, PAD, PAD, END, 7, EOS],
            *((12, 1, 0), ((1, 2, 2), (1, 4, 2))),
        ),
    ],
)
def test_golden_rows(
    text: str,
    sizes: list[tuple[int, int]],
    target: str | None,
    ids: list[int],
    segments: tuple[int, int, int],
    grids: tuple[tuple[int, int, int], ...],
    processor: Processor,
    make_image: MakeImage,
) -> None:
    sample = process(processor, text, *(make_image(size) for size in sizes), target=target)
    assert sample.input_ids.tolist() == ids
    assert sample.segment_lengths == segments
    assert sample.grids == grids
    kinds = dict.fromkeys((EOS, START, END), SPECIAL) | {PAD: VISUAL}
    assert sample.kinds.tolist() == [kinds.get(i, TEXT) for i in ids]
    assert sample.position_ids.shape == (3, len(ids))
    assert sample.patches.shape == (sum(h * w for _, h, w in grids), 588)
    assert (sample.key, sample.row_id, sample.role) == (1, "toy row 7", 2)
    assert not len(sample.hidden) + len(sample.targets) + len(sample.hidden_visual)


# --- Truncation ------------------------------------------------------------------------------

LONG = "the cat and the dog sleep near one red sofa " * 5


def test_long_text_is_cut_at_its_end_and_this_is_logged_once(
    make_processor: MakeProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    whole = process(make_processor(max_length=200), LONG).input_ids
    assert not caplog.records
    processor = make_processor(max_length=20)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sample = process(processor, LONG)
    assert sample.input_ids.tolist() == [*whole[:19], EOS]
    assert sample.segment_lengths == (19, 1, 0)
    assert [r.getMessage() for r in caplog.records] == [
        f"toy row 7 is longer than max_length=20 and loses {len(whole) - 20} text tokens "
        "(said once)"
    ]


def test_no_length_cuts_an_image_or_eos(
    make_processor: MakeProcessor, make_image: MakeImage
) -> None:
    images = [make_image((28, 28)), make_image((28, 28), seed=1)]
    full = [269, 227, START, PAD, END, 294, 227, START, PAD, END, 7, EOS, 89, 301, 82, 285]
    for length in range(7, 20):
        processor = make_processor(max_length=length)
        sample = process(processor, f"the {SLOT} and {SLOT}!", *images, target="small cat")
        ids = sample.input_ids.tolist()
        assert len(ids) == min(length, len(full)) == sample.position_ids.shape[1]
        assert [i for i in ids if i in (START, PAD, END, EOS)] == [*[START, PAD, END] * 2, EOS]
        context, eos, target = sample.segment_lengths
        assert (context + eos + target, eos) == (len(ids), 1)
        assert ids[context] == EOS
        assert ids[context + 1 :] == full[12 : 12 + target]
        assert (sample.kinds == VISUAL).tolist() == [i == PAD for i in ids]


def test_context_and_target_share_what_is_left(make_processor: MakeProcessor) -> None:
    whole = process(make_processor(max_length=200), LONG).input_ids.tolist()
    for length in (10, 21, 50):
        sample = process(make_processor(max_length=length), LONG, target=LONG)
        context, _, target = sample.segment_lengths
        assert (context, target) == (length - 1 - (length - 1) // 2, (length - 1) // 2)
        assert sample.input_ids.tolist() == [*whole[:context], EOS, *whole[:target]]
    sample = process(make_processor(max_length=21), "the", target=LONG)
    assert sample.segment_lengths == (1, 1, 19), "a short CONTEXT leaves its room to TARGET"


@pytest.mark.parametrize("length", [8, 3])
def test_images_that_do_not_fit_are_refused_by_row(
    length: int, make_processor: MakeProcessor, make_image: MakeImage
) -> None:
    image = make_image((56, 84))  # six visual tokens, two marks and EOS
    assert len(process(make_processor(max_length=9), SLOT, image).input_ids) == 9
    with pytest.raises(UserError) as caught:
        process(make_processor(max_length=length), SLOT, image)
    assert str(caught.value) == (
        f"toy row 7: images and the end token take 9 tokens, more than max_length={length}; "
        "lower max_pixels or raise max_length"
    )


def test_a_tokenizer_without_an_end_token_is_refused(processor: Processor) -> None:
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no end token .* as model\.eos_token="):
        Processor(
            tokenizer,
            processor.image_processor,
            max_length=128,
            min_pixels=784,
            max_pixels=784,
            num_token_rows=324,
        )


# --- Tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a <|im_end|><|image_pad|> b<|vision_start|>",
        "<|endoftext|><|im_start|>user",
        "Ωmega 3 ≈ π, 日本語 🐶",
        " tab\tand\nline  ",
    ],
)
def test_any_text_is_spelt_out_and_decodes_back(
    text: str, processor: Processor, make_image: MakeImage
) -> None:
    """Special tokens in a user's text are words."""
    sample = process(processor, f"{SLOT}{text}", make_image((28, 28)), target=text)
    context, _, target = sample.segment_lengths
    assert target == context - 3
    for part in (slice(3, context), slice(context + 1, None)):
        assert (sample.kinds[part] == TEXT).all()
        assert (sample.input_ids[part] > 6).all()
        assert processor.tokenizer.decode(sample.input_ids[part]) == text


def test_mask_token_is_a_row_that_no_text_uses(loaded: Loaded, processor: Processor) -> None:
    assert processor.mask_id == loaded.num_token_rows - 1
    assert processor.mask_id not in processor.tokenizer.get_vocab().values()
    with pytest.raises(UserError, match="no reserved row for the mask token"):
        Processor(
            loaded.tokenizer,
            loaded.image_processor,
            max_length=64,
            min_pixels=784,
            max_pixels=784,
            num_token_rows=len(loaded.tokenizer),
        )


def test_a_tokenizer_is_used_by_one_thread_at_a_time_and_a_cut_is_logged_once(
    make_processor: Callable[..., Processor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    processor = make_processor(max_length=8)
    inside, most, lock = 0, 0, threading.Lock()
    original = processor.tokenizer

    class Watched:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.001)
            encoded = original(*args, **kwargs)
            with lock:
                inside -= 1
            return encoded

    monkeypatch.setattr(processor, "tokenizer", Watched())
    texts = [f"the {'dog ' * (n % 7)}near {n % 11} cats" for n in range(200)]
    expected = [original(text, add_special_tokens=False).input_ids for text in texts]
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(lambda text: process(processor, text), texts))
    assert [s.input_ids.tolist() for s in samples] == [[*ids[:7], EOS] for ids in expected]
    assert most == 1
    assert caplog.text.count("said once") == 1
