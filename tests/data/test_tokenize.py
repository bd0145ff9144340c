"""Items in, tokens out: golden rows, truncation, and texts that look like special tokens."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from cocoa_pl.batch import Encoded
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import Loaded

SLOT = IMAGE_SLOT
EOS, START, END, PAD = 2, 3, 4, 5  # <|im_end|>, <|vision_start|>, <|vision_end|>, <|image_pad|>
MakeImage = Callable[..., Image.Image]

# Item, sizes of its images (width, height), TARGET -> ids, text, segment lengths, grids
GOLDEN = {
    "text": (
        "the red dog",
        [],
        None,
        [269, 287, 296, EOS],
        "the red dog<|im_end|>",
        (3, 1, 0),
        [],
    ),
    "image before text, and a target": (
        f"{SLOT}\ntwo boats",
        [(56, 28)],
        "small cat",
        [START, PAD, PAD, END, 205, 292, 295, EOS, 89, 301, 82, 285],
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>\ntwo boats<|im_end|>small cat",
        (7, 1, 4),
        [[1, 2, 4]],
    ),
    "two images inside text": (
        f"the {SLOT} and {SLOT}!",
        [(28, 28), (28, 56)],
        None,
        [269, 227, START, PAD, END, 294, 227, START, PAD, PAD, END, 7, EOS],
        "the <|vision_start|><|image_pad|><|vision_end|> and <|vision_start|><|image_pad|>"
        "<|image_pad|><|vision_end|>!<|im_end|>",
        (12, 1, 0),
        [[1, 2, 2], [1, 4, 2]],
    ),
    "image alone": (
        SLOT,
        [(28, 28)],
        None,
        [START, PAD, END, EOS],
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>",
        (3, 1, 0),
        [[1, 2, 2]],
    ),
}


def encode(
    processor: Processor,
    text: str,
    *images: Image.Image | Path,
    target: str | None = None,
) -> Encoded:
    return processor.encode(Item(text, images), target, key=1, seed=2, row_id="toy row 7")


@pytest.mark.parametrize(
    ("text", "sizes", "target", "ids", "decoded", "segments", "grids"),
    GOLDEN.values(),
    ids=GOLDEN.keys(),
)
def test_golden_rows(
    text: str,
    sizes: list[tuple[int, int]],
    target: str | None,
    ids: list[int],
    decoded: str,
    segments: tuple[int, int, int],
    grids: list[list[int]],
    processor: Processor,
    make_image: MakeImage,
) -> None:
    sample = encode(processor, text, *(make_image(size) for size in sizes), target=target)
    assert sample.input_ids.tolist() == ids
    assert processor.tokenizer.decode(ids) == decoded
    assert sample.segment_lengths == segments
    assert sample.grids.tolist() == grids
    assert sample.image_mask.tolist() == [i == PAD for i in ids]
    assert sample.text_mask.tolist() == [i not in (EOS, START, END, PAD) for i in ids]
    assert sample.position_ids.shape == (3, len(ids))
    assert sample.patches.shape == (sum(h * w for _, h, w in grids), 588)
    assert (sample.key, sample.seed, sample.row_id) == (1, 2, "toy row 7")


def test_patches_are_the_bytes_of_the_picture(processor: Processor, make_image: MakeImage) -> None:
    image = make_image((56, 28))
    sample = encode(processor, SLOT, image)
    assert sample.patches.dtype == torch.uint8
    pixels = torch.tensor(list(image.get_flattened_data()), dtype=torch.uint8).view(28, 56, 3)
    # Four patches of a visual token lie together: two above, two below.
    corners = [(0, 0), (0, 14), (14, 0), (14, 14), (0, 28), (0, 42), (14, 28), (14, 42)]
    for patch, (top, left) in zip(sample.patches, corners, strict=True):
        square = pixels[top : top + 14, left : left + 14].permute(2, 0, 1)
        assert torch.equal(patch, square.flatten())


@pytest.mark.parametrize("size", [(5, 9), (300, 200), (200, 30), (28, 28), (1000, 1000)])
def test_images_are_resized_into_the_bounds(
    size: tuple[int, int], processor: Processor, make_image: MakeImage
) -> None:
    sample = encode(processor, SLOT, make_image(size))
    assert 784 <= 14 * 14 * len(sample.patches) <= 56 * 84
    ((_, height, width),) = sample.grids.tolist()
    assert (width > height) == (size[0] > size[1])


def test_extreme_values_survive_resizing(processor: Processor) -> None:
    stripes = Image.new("RGB", (300, 200), "black")
    stripes.paste("white", (100, 0, 200, 200))  # bicubic overshoot must be clipped, not wrapped
    patches = encode(processor, SLOT, stripes).patches
    assert {int(patches.min()), int(patches.max())} == {0, 255}
    white = encode(processor, SLOT, Image.new("RGB", (90, 70), "white")).patches
    assert white.unique().tolist() == [255]


# --- Truncation ------------------------------------------------------------------------------

LONG = "the cat and the dog sleep near one red sofa " * 5


def test_long_text_is_cut_at_its_end_and_eos_stays(
    make_processor: Callable[..., Processor],
) -> None:
    whole = encode(make_processor(max_length=200), LONG)
    cut = encode(make_processor(max_length=20), LONG)
    assert cut.input_ids.tolist() == [*whole.input_ids[:19].tolist(), EOS]
    assert cut.segment_lengths == (19, 1, 0)


@pytest.mark.parametrize("length", range(7, 40))
def test_no_length_cuts_an_image_or_eos(
    length: int, make_processor: Callable[..., Processor], make_image: MakeImage
) -> None:
    processor = make_processor(max_length=length)
    images = [make_image((28, 28)), make_image((28, 28), seed=1)]
    sample = encode(processor, f"the {SLOT} and {SLOT}!", *images, target="small cat")
    ids = sample.input_ids.tolist()
    full = [269, 227, START, PAD, END, 294, 227, START, PAD, END, 7, EOS, 89, 301, 82, 285]
    assert len(ids) == min(length, len(full))
    assert [i for i in ids if i in (START, PAD, END, EOS)] == [*[START, PAD, END] * 2, EOS]
    assert int(sample.image_mask.sum()) == 2
    context, eos, target = sample.segment_lengths
    assert (context + eos + target, eos) == (len(ids), 1)
    assert ids[context] == EOS
    assert ids[context + 1 :] == full[12 : 12 + target]
    assert not (sample.text_mask & sample.image_mask).any()
    assert sample.position_ids.shape == (3, len(ids))


def test_context_and_target_share_what_is_left(make_processor: Callable[..., Processor]) -> None:
    whole = encode(make_processor(max_length=200), LONG, target=LONG)
    for length in (10, 21, 50):
        cut = encode(make_processor(max_length=length), LONG, target=LONG)
        context, _, target = cut.segment_lengths
        assert (context, target) == (length - 1 - (length - 1) // 2, (length - 1) // 2)
        assert cut.input_ids[:context].tolist() == whole.input_ids[:context].tolist()
        assert cut.input_ids[context + 1 :].tolist() == whole.input_ids[:target].tolist()


def test_a_short_context_leaves_its_room_to_target(
    make_processor: Callable[..., Processor],
) -> None:
    cut = encode(make_processor(max_length=21), "the", target=LONG)
    assert cut.segment_lengths == (1, 1, 19)


def test_truncation_is_said_once(
    make_processor: Callable[..., Processor], caplog: pytest.LogCaptureFixture
) -> None:
    lost = len(encode(make_processor(max_length=200), LONG).input_ids) - 10
    processor = make_processor(max_length=10)
    with caplog.at_level(logging.WARNING):
        encode(processor, LONG)
        encode(processor, LONG)
    assert [r.getMessage() for r in caplog.records] == [
        f"toy row 7 is longer than max_length=10 and loses {lost} text tokens (said once)"
    ]


@pytest.mark.parametrize("length", [8, 3])
def test_images_that_do_not_fit_are_refused_by_row(
    length: int, make_processor: Callable[..., Processor], make_image: MakeImage
) -> None:
    image = make_image((56, 84))  # six visual tokens, two marks and EOS
    assert len(encode(make_processor(max_length=9), SLOT, image).input_ids) == 9
    with pytest.raises(UserError) as caught:
        encode(make_processor(max_length=length), SLOT, image)
    assert str(caught.value) == (
        f"toy row 7: images and the end token take 9 tokens, more than max_length={length}; "
        "lower max_pixels or raise max_length"
    )


# --- Text that looks like something else -----------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<|image_pad|>",
        "<|im_end|>",
        "a <|im_end|><|image_pad|> b<|vision_start|>",
        "<|endoftext|><|im_start|>user",
    ],
)
def test_literal_special_tokens_are_spelt_out_and_decode_back(
    text: str, processor: Processor, make_image: MakeImage
) -> None:
    sample = encode(processor, f"{SLOT}{text}", make_image((28, 28)), target=text)
    context, _, target = sample.segment_lengths
    assert int(sample.image_mask.sum()) == 1
    assert sample.input_ids.tolist().count(EOS) == 1
    for part in (sample.input_ids[3:context], sample.input_ids[context + 1 :]):
        assert not torch.isin(part, torch.arange(7)).any()
        assert processor.tokenizer.decode(part) == text
    assert sample.text_mask[3:context].all()
    assert target == context - 3


@pytest.mark.parametrize("text", ["Ωmega 3 ≈ π", "日本語 🐶", "tab\tand\nline", "  spaces  "])
def test_any_text_decodes_back(text: str, processor: Processor) -> None:
    sample = encode(processor, text)
    assert processor.tokenizer.decode(sample.input_ids[:-1]) == text


def test_mask_token_is_a_row_that_no_text_uses(processor: Processor, loaded: Loaded) -> None:
    assert processor.mask_id == loaded.backbone.num_token_rows - 1
    assert processor.mask_id >= len(processor.tokenizer)
    assert processor.mask_id not in processor.tokenizer.get_vocab().values()


def test_model_without_a_reserved_row_is_refused(loaded: Loaded) -> None:
    with pytest.raises(UserError, match="no reserved row for the mask token"):
        Processor(
            loaded.tokenizer,
            loaded.image_processor,
            max_length=64,
            min_pixels=784,
            max_pixels=784,
            num_token_rows=len(loaded.tokenizer),
        )


def test_image_that_cannot_be_read_is_refused_by_row(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^toy row 7: image .*gone\.png does not exist"):
        encode(processor, SLOT, tmp_path / "gone.png")
