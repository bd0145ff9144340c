"""What the model's own processor would make of an item: tokens, M-RoPE positions, uint8 patches.

transformers' combined Qwen processors need torchvision; the tokenizer and the PIL image processor
do not, so the placeholder expansion is done here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from cocoa_pl.data.batch import SPECIAL, TEXT, VISUAL, Grid, Ints, Sample
from cocoa_pl.data.images import open_image
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.errors import UserError

log = logging.getLogger(__name__)

# transformers sets up a fast tokenizer anew before every call, and Rust refuses ("Already
# borrowed") while another thread is inside.
_one_at_a_time = threading.Lock()


@lru_cache(maxsize=1 << 13)  # prompts and answers come again and again
def tokenized(tokenizer: Any, text: str) -> NDArray[np.int32]:
    """A literal `<|im_end|>` or `<|image_pad|>` in a user's text is spelt out, never obeyed."""
    with _one_at_a_time:
        # Not verbose: it would warn of "indexing errors" in long texts, which are cut here.
        tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return np.array(tokens.input_ids, np.int32)


class _Patches(NamedTuple):
    """One image."""

    patches: NDArray[np.uint8]  # (p, B), in the order of the vision tower
    grid: Grid
    num_tokens: int


class Processor:
    """Turns items into samples for one model; several threads may use one.

    Args:
        tokenizer: a Hugging Face tokenizer; its own end token is EOS.
        image_processor: the model's PIL image processor.
        max_length: tokens of a sample, EOS included; longer texts are cut, images and EOS never.
        min_pixels, max_pixels: bounds of an image after resizing, in pixels.
        num_token_rows: rows of the model's token embedding; the last, which no token uses, is the
            mask token.

    Raises:
        UserError: if the model has no reserved row left for the mask token, or no picture lies
            within the bounds.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        *,
        max_length: int,
        min_pixels: int,
        max_pixels: int,
        num_token_rows: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_length = max_length
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end token (eos_token), whose state is the embedding; "
                "name one of its special tokens as model.eos_token=..."
            )
        self.eos_id: int = tokenizer.eos_token_id
        token = tokenizer.convert_tokens_to_ids
        self.image_id: int = token("<|image_pad|>")
        self.vision_start_id: int = token("<|vision_start|>")
        self.vision_end_id: int = token("<|vision_end|>")
        self.mask_id = num_token_rows - 1
        if self.mask_id < len(tokenizer):
            raise UserError("the model's token embedding has no reserved row for the mask token")
        self.merge_size: int = image_processor.merge_size
        self.patch_size: int = image_processor.patch_size
        least = max(min_pixels, (self.patch_size * self.merge_size) ** 2)  # one visual token
        if max_pixels < least:
            raise UserError(
                f"max_pixels={max_pixels} is below {least}: min_pixels, or one visual token"
            )
        self._reported_truncation = False

    @property
    def patch_values(self) -> int:
        """Bytes of one patch of one frame: channels x side x side."""
        return 3 * self.patch_size**2

    def count_text_tokens(self, text: str) -> int:
        """Tokens of a text without image slots."""
        return len(self._text_ids(text))

    def count_visual_tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of this size; its start and end tokens not counted."""
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        patches = self.image_processor.get_number_of_image_patches(height, width, bounds)
        return int(patches) // self.merge_size**2

    def room_for_text(self, visual_tokens: Sequence[int]) -> int:
        """Tokens left beside EOS and images of so many visual tokens, each with a start and an end.

        Raises:
            UserError: if there is no room for the images.
        """
        needed = 1 + sum(count + 2 for count in visual_tokens)
        if needed > self.max_length:
            raise UserError(
                f"images and the end token take {needed} tokens, more than max_length="
                f"{self.max_length}; lower max_pixels or raise max_length",
                kind="images_exceed_length",
            )
        return self.max_length - needed

    def __call__(
        self,
        context: Item,
        target: str | None,
        *,
        key: int,
        row_id: str,
        role: int = 0,
        pool: int = 0,
    ) -> Sample:
        """CONTEXT + EOS, and behind it the text to be rebuilt where there is one.

        Raises:
            UserError: naming the row, for an image that cannot be read or does not fit into
                `max_length`.
        """
        try:
            parts = self._parts(context)
            images = [part for part in parts if isinstance(part, _Patches)]
            budget = self.room_for_text([image.num_tokens for image in images])
        except UserError as error:
            error.row_id = row_id
            raise
        target_ids = [] if target is None else self._text_ids(target)
        parts, target_ids = self._truncated(parts, target_ids, budget, row_id)

        ids: list[int] = []
        kinds: list[int] = []
        spans: list[int | Grid] = []
        for part in parts:
            if isinstance(part, _Patches):
                count = part.num_tokens
                ids += [self.vision_start_id, *[self.image_id] * count, self.vision_end_id]
                kinds += [SPECIAL, *[VISUAL] * count, SPECIAL]
                spans += [1, part.grid, 1]
            else:
                ids += part
                kinds += [TEXT] * len(part)
                spans.append(len(part))
        segment_lengths = (len(ids), 1, len(target_ids))
        ids += [self.eos_id, *target_ids]
        kinds += [SPECIAL, *[TEXT] * len(target_ids)]
        spans.append(1 + len(target_ids))
        no_patches = np.empty((0, self.patch_values), np.uint8)
        return Sample(
            input_ids=np.array(ids),
            kinds=np.array(kinds, np.uint8),
            position_ids=mrope_positions(spans, merge_size=self.merge_size),
            segment_lengths=segment_lengths,
            patches=np.concatenate([no_patches, *(image.patches for image in images)]),
            grids=tuple(image.grid for image in images),
            key=key,
            row_id=row_id,
            role=role,
            pool=pool,
        )

    def _parts(self, item: Item) -> list[list[int] | _Patches]:
        """Texts and images in reading order."""
        parts: list[list[int] | _Patches] = []
        for rank, text in enumerate(item.text.split(IMAGE_SLOT)):
            if rank:
                parts.append(self._patches(open_image(item.media[rank - 1])))
            if text:
                parts.append(self._text_ids(text))
        return parts

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = tokenized(self.tokenizer, text).tolist()
        return ids

    def _truncated(
        self, parts: Sequence[list[int] | _Patches], target: list[int], budget: int, row_id: str
    ) -> tuple[list[list[int] | _Patches], list[int]]:
        """Cut ends of texts to `budget` tokens; TARGET may have half of it, CONTEXT the rest."""
        num_context = sum(len(part) for part in parts if isinstance(part, list))
        excess = num_context + len(target) - budget
        if excess <= 0:
            return list(parts), target
        with _one_at_a_time:
            was_said, self._reported_truncation = self._reported_truncation, True
        if not was_said:
            log.warning(
                "%s is longer than max_length=%d and loses %d text tokens (said once)",
                *(row_id, self.max_length, excess),
            )
        target = target[: max(budget - num_context, budget // 2)]
        excess = num_context + len(target) - budget
        kept: list[list[int] | _Patches] = []
        for part in reversed(parts):
            if isinstance(part, list):
                cut = min(excess, len(part))
                part, excess = part[: len(part) - cut], excess - cut
            kept.append(part)
        return kept[::-1], target

    def _patches(self, image: Image) -> _Patches:
        """As the stock processor has them, but resized as a picture, not as two arrays of it."""
        height, width = smart_resize(
            image.height,
            image.width,
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        resized = image.resize((width, height), Resampling(self.image_processor.resample))
        patches = cut(resized, patch_size=self.patch_size, merge_size=self.merge_size)
        grid = (1, height // self.patch_size, width // self.patch_size)
        return _Patches(patches, grid, len(patches) // self.merge_size**2)


def mrope_positions(spans: Sequence[int | Grid], *, merge_size: int) -> Ints:
    """Positions of one sample whose parts are runs of text (their length) and images (their grid):
    M-RoPE (Qwen2-VL, arXiv 2409.12191).

    Text advances all three axes together; an image's tokens share the temporal index and count rows
    and columns; what follows starts behind the larger side of the image. Equals `get_rope_index` of
    the stock model (tested).

    Returns:
        (3, t) int64: temporal, height, width.
    """
    columns, start = [], 0
    for span in spans:
        if isinstance(span, int):
            columns.append(np.broadcast_to(np.arange(start, start + span), (3, span)))
            start += span
        else:
            frames, height, width = span[0], span[1] // merge_size, span[2] // merge_size
            columns.append(np.indices((frames, height, width)).reshape(3, -1) + start)
            start += max(height, width)
    return np.concatenate(columns, axis=1)


def cut(image: Image, *, patch_size: int, merge_size: int) -> NDArray[np.uint8]:
    """Patches of an RGB picture whose sides are multiples of `patch_size * merge_size`.

    The stock image processor does the same in float32, with every frame repeated. Here pixels stay
    bytes: an eighth of what goes to the device, and bit-equal after `Backbone.pixels`. The patches
    of one visual token lie together; within a patch channels come first. For sides of two visual
    tokens of 2 x 2 patches:

         0  1 |  4  5
         2  3 |  6  7
        ------+------
         8  9 | 12 13
        10 11 | 14 15

    Returns:
        (p, channels * patch_size ** 2).
    """
    rows, columns = (side // (patch_size * merge_size) for side in (image.height, image.width))
    patches = np.empty((rows, columns, merge_size, merge_size, 3, patch_size, patch_size), np.uint8)
    # A row of a patch is contiguous on both sides: it is moved as one item, not byte by byte.
    item = np.dtype((np.void, patch_size))
    places = patches.view(item)[..., 0].transpose(4, 0, 2, 5, 1, 3)
    for place, channel in zip(places, image.split(), strict=True):
        place[...] = np.asarray(channel).view(item).reshape(place.shape)
    return patches.reshape(rows * columns * merge_size**2, 3 * patch_size**2)
