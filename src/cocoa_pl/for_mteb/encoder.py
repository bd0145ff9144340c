"""An `Embedder` as mteb's encoder, with an instruction for each task.

mteb: https://github.com/embeddings-benchmark/mteb. Images are never left out: a batch that holds
anything this model cannot embed is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray
from PIL.Image import Image

from cocoa_pl.data.items import Item, as_item
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.models.exported import digest_of_text

# Tasks of mteb over data that MMEB-train holds; a model trained on it is not zero-shot there.
MMEB_TRAIN = frozenset(
    {
        *("HatefulMemesI2TRetrieval", "HatefulMemesT2IRetrieval", "SUN397", "SUN397ZeroShot"),
        *("VOC2007", "OKVQAIT2TRetrieval", "CIRRIT2IRetrieval", "NIGHTSI2IRetrieval"),
        *("WebQAT2ITRetrieval", "WebQAT2TRetrieval", "VisualNewsI2TRetrieval"),
        *("VisualNewsT2IRetrieval", "MSCOCOI2TRetrieval", "MSCOCOT2IRetrieval"),
    }
)

AT_ONCE = 4096  # items whose images are in memory together
_PARTS = ("text", "image")


class CocoaEncoder(AbsEncoder):
    """A model as mteb wants one; `mteb.evaluate(CocoaEncoder(...), tasks)` scores it.

    Args:
        name: `organization/model`, as results are filed.
        instructions: what items are embedded for, by a task's name, a task's type, `query`, or one
            of these with `-query` or `-document` behind it. Without one, queries have the prompt
            that the task brings, or that of its kind, and documents and labels have none.
        training_datasets: names that mteb knows; `MMEB_TRAIN` for a model trained on it. None says
            that it is not known.
        license: of the weights, as mteb writes it.
        batch_tokens, threads: as in `Embedder.encode`.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        name: str,
        instructions: Mapping[str, str] | None = None,
        training_datasets: Collection[str] | None = None,
        license: str | None = None,
        batch_tokens: int = 8192,
        threads: int = 4,
    ) -> None:
        self.embedder = embedder
        self.instructions = dict(instructions or {})
        self.batch_tokens = batch_tokens
        self.threads = threads
        stock = embedder.backbone.stock
        self.mteb_model_meta = ModelMeta(  # all that mteb's leaderboard asks of a model
            loader=None,
            name=name,
            # Of all that vectors depend on: results of other weights, attention, pixels or
            # instructions are never taken for these.
            revision=digest_of_text(
                json.dumps([embedder.identity(), self.instructions], sort_keys=True)
            ),
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=sum(p.numel() for p in stock.parameters()),
            n_embedding_parameters=stock.get_input_embeddings().weight.numel(),
            memory_usage_mb=None,
            max_tokens=embedder.processor.max_length,
            embed_dim=embedder.dim,
            license=license,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch", "Transformers"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=True,
            training_datasets=None if training_datasets is None else set(training_datasets),
            modalities=["image", "text"],
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Embed what a loader of mteb yields.

        Args:
            inputs: batches; columns `text` (strings) and `image` (PIL images, or lists of them).
            kwargs: mteb's `show_progress_bar`; its `batch_size` is the loader's, not the model's.

        Returns:
            (N, D) float32, rows of unit length, in the loader's order.

        Raises:
            UserError: for an item without text and image, or one that holds anything else to embed.
        """
        name, parts = task_metadata.name, []
        items = (
            as_item(item, self.instruction(task_metadata, prompt_type, has_image=bool(item.media)))
            for item in _items(inputs, task=name)
        )
        while some := list(islice(items, AT_ONCE)):
            parts.append(
                self.embedder.encode(
                    some,
                    batch_tokens=self.batch_tokens,
                    threads=self.threads,
                    progress=bool(kwargs.get("show_progress_bar", False)),
                )
            )
        if not parts:
            raise UserError(f"{name} ({hf_subset}, {hf_split}) holds no items")
        return np.concatenate(parts)

    def instruction(
        self, task_metadata: Any, prompt_type: PromptType | None, *, has_image: bool
    ) -> str | None:
        """What an item is embedded for; None for nothing.

        Args:
            has_image: it is, or holds, an image. mteb does not say which items are labels: in a
                task with images they are those without.
        """
        is_label = prompt_type is None and "image" in task_metadata.modalities and not has_image
        side = "document" if prompt_type == PromptType.document or is_label else "query"
        names = [task_metadata.name, task_metadata.type]
        keys = [key for name in names for key in (f"{name}-{side}", name)]
        if side == "document":
            keys = [key for key in keys if key.endswith("-document")]
        for key in [*keys, side]:
            if key in self.instructions:
                return self.instructions[key] or None
        prompt = task_metadata.prompt
        if isinstance(prompt, Mapping):
            return prompt.get(side) or None
        if side == "document":
            return None
        return prompt or self.get_task_instruction(task_metadata, prompt_type) or None


def _items(batches: Iterable[Mapping[str, Any]], *, task: str) -> Iterator[Item]:
    """Texts and images one by one; labels and other facts about items are left out."""
    numbers = count()
    for batch in batches:
        columns = {key: batch[key] for key in _PARTS if key in batch}
        for key, values in batch.items():
            if key in ("audio", "video") or (key not in _PARTS and any(map(_is_image, values))):
                raise UserError(f"{task}: items hold {key}, not only a text and an image")
        if not columns:
            raise UserError(f"{task}: items hold neither texts nor images")
        for row in zip(*columns.values(), strict=True):
            value = dict(zip(columns, row, strict=True))
            if value.get("text") == "" and value.get("image") in (None, []):
                value["text"] = " "  # corpora hold documents without a word
            number = next(numbers)
            try:
                yield as_item(value)
            except UserError as error:
                error.row_id = f"{task}: item {number}"
                raise


def _is_image(value: object) -> bool:
    return isinstance(value, Image) or (isinstance(value, list) and any(map(_is_image, value)))
