"""Small models of random weights, as ordinary Hugging Face folders.

Nothing behind it knows that the model is small: it is loaded by the same code as
Qwen/Qwen2-VL-2B-Instruct.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_pl.config.bounds import Count, NotNegative, Positive, Seed

# Makes the training texts: millions of them, which only a source without a tokenizer reads.
Texts = Callable[[], Sequence[str]]


# The special tokens of Qwen2-VL, by the same names.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True, kw_only=True)
class TinySource:
    """Builds the folder once for each set of values and texts, and finds it again later.

    Args:
        cache_dir: where the folder is kept.
        family: `model_type` of a stock configuration.
        seed: of the random weights.
        vocabulary_size: tokens of the tokenizer, special ones included.
        reserved_rows: embedding rows that no token uses, as in Qwen2-VL; one becomes the mask
            token.
        text, vision: fields of the stock text and vision configurations.
        image_mean, image_std: pixel statistics, of each channel.
        min_pixels, max_pixels: bounds of the image processor, pixels per image.
    """

    cache_dir: str
    family: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    seed: Seed
    vocabulary_size: Count
    reserved_rows: Count
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image_mean: Sequence[NotNegative]
    image_std: Sequence[Positive]
    min_pixels: Count
    max_pixels: Count

    def folder(self, texts: Texts) -> Path:
        unique = sorted(set(texts()))
        values = {name: value for name, value in vars(self).items() if name != "cache_dir"}
        digest = hashlib.sha256(json.dumps([values, unique], sort_keys=True).encode())
        folder = Path(self.cache_dir) / f"tiny-{digest.hexdigest()[:16]}"
        if not (folder / "config.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.cache_dir) as scratch:
                self._build(Path(scratch) / "model", unique)
                if not folder.exists():  # another process may have been faster
                    os.rename(Path(scratch) / "model", folder)
        return folder

    def config(self, token: Callable[[str], Any] = lambda _: 0) -> PretrainedConfig:
        """The architecture, which needs no texts.

        Args:
            token: ids of special tokens, by name.
        """
        config: PretrainedConfig = AutoConfig.for_model(
            self.family,
            text_config={
                **self.text,
                # Counted from the size asked for, so that the shape does not depend on the texts.
                "vocab_size": self.vocabulary_size + self.reserved_rows,
                "bos_token_id": token("<|endoftext|>"),
                "eos_token_id": token("<|im_end|>"),
            },
            vision_config=dict(self.vision),
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=True,
        )
        return config

    def _build(self, folder: Path, texts: Sequence[str]) -> None:
        tokenizer = train_tokenizer(texts, vocabulary_size=self.vocabulary_size)
        config: Any = self.config(tokenizer.convert_tokens_to_ids)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(
            patch_size=config.vision_config.patch_size,
            merge_size=config.vision_config.spatial_merge_size,
            temporal_patch_size=config.vision_config.temporal_patch_size,
            size={"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            image_mean=list(self.image_mean),
            image_std=list(self.image_std),
        ).save_pretrained(folder)


def train_tokenizer(texts: Sequence[str], *, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Qwen's manner, learnt from the texts; it can spell any other
    text too.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
