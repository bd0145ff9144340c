"""Small models of the supported families, wide enough that activations outweigh everything else,
and batches of random patches and tokens for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from cocoa_pl.attention import TEXT_ATTENTION, Policy
from cocoa_pl.data.batch import VISUAL, Batch, Sample
from cocoa_pl.data.examples import BridgeExamples, CaptionExamples, PairExamples
from cocoa_pl.models.adapters import FullTuning, LowRank
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES
from cocoa_pl.planning.families import model_shape
from cocoa_pl.planning.samples import Lengths, rank_rows
from cocoa_pl.planning.shapes import ModelShape
from cocoa_pl.planning.tuning import Adapter, Tuning
from cocoa_pl.planning.work import Work, work_of
from cocoa_pl.stages.base import Optimization, StageModule
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.reconstruction import ReconstructionModule

TARGETS = (
    r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.\w*(fc1|fc2|_proj))",
)
VOCABULARY = 512

IDS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5}
CONFIGS: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "small_models.yaml").read_text()
)
LENGTHS = Lengths(
    text=24,
    images_per_query=1,
    images_per_positive=0,
    negatives=0,
    grid=(5, 6),
    row_bytes=1,
    image_bytes=1,
)


def adapter(**choices: bool) -> Adapter:
    defaults = {"use_dora": False, "lean": False, "dropout_on_base": True}
    return Adapter(rank=8, dropout=0.1, targets=TARGETS, **(defaults | choices))


ADAPTERS = {
    "none": None,
    "lora": adapter(),
    "dora": adapter(use_dora=True),
    "lean": adapter(use_dora=True, lean=True),
    "leaner": adapter(use_dora=True, lean=True, dropout_on_base=False),
}


@dataclass(frozen=True)
class Small:
    """A stage over a small model, with what the plan believes about it."""

    module: StageModule
    batches: list[Batch]
    shape: ModelShape
    tuning: Tuning
    works: list[Work]
    checkpointing: bool
    decoder: bool

    def step(self) -> None:
        """Forward and backward of one step."""
        self.module.accumulate(self.batches)

    @property
    def queries(self) -> int:
        """0 where there is no contrast."""
        return sum(batch.num_rows for batch in self.batches) * self.contrasts

    @property
    def candidates(self) -> int:
        """Of all queries."""
        return sum(batch.num_samples for batch in self.batches) * self.contrasts - self.queries

    @property
    def contrasts(self) -> bool:
        return isinstance(self.module, ContrastiveModule)


MakeSmall = Callable[..., Small]
STAGES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "pretrain": (
        "causal",
        CaptionExamples(),
        {"text_ratio": None, "text_segment": "context", "patch_ratio": 0.0},
    ),
    "warmup": (
        "bidirectional",
        CaptionExamples(),
        {"text_ratio": 0.2, "text_segment": "context", "patch_ratio": 0.5},
    ),
    "reconstruct": (
        "eos_bridge",
        BridgeExamples(sources={"query": 0.5, "self": 0.5}),
        {"text_ratio": 0.7, "text_segment": "target", "patch_ratio": 0.0},
    ),
    "contrast": ("bidirectional", PairExamples(max_negatives=1), {}),
}


def small_model(family: str, *, dtype: torch.dtype = torch.float32, **text: Any) -> nn.Module:
    config = small_config(family, **text)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForImageTextToText.from_config(
        config, dtype=dtype, attn_implementation=TEXT_ATTENTION
    )
    return model


def small_config(family: str, **text: Any) -> Any:
    values = CONFIGS[family]
    return AutoConfig.for_model(
        family,
        text_config={**values["text_config"], **text},
        vision_config=values["vision_config"],
        tie_word_embeddings=True,
        **IDS,
    )


def filled(sample: Sample, module: StageModule, rng: np.random.Generator) -> Sample:
    """Random tokens and patches in the place of blanks, masked as the stage does it."""
    size = (len(sample.patches), module.processor.patch_values)
    ids = rng.integers(10, VOCABULARY - 1, sample.num_tokens)
    sample = replace(
        sample,
        input_ids=np.where(sample.kinds == VISUAL, IDS["image_token_id"], ids),
        patches=rng.integers(0, 256, size, np.uint8),
    )
    masking = module.masking
    return sample if masking is None else masking(sample, rng)


@pytest.fixture(scope="session")
def make_small(policies: dict[str, Policy]) -> MakeSmall:
    """A stage with a small model, ready for one step."""

    def make(
        stage: str = "contrast",
        *,
        family: str = "qwen2_vl",
        adapter: str = "none",
        checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
        policy: str | None = None,
        rows: int = 4,
        token_budget: int = 100_000,
        lengths: Lengths = LENGTHS,
        **text: Any,
    ) -> Small:
        default_policy, make_samples, choices = STAGES[stage]
        backbone = _backbone(family, dtype, adapter, checkpointing, text)
        module = _module(
            backbone,
            policies[policy or default_policy],
            choices,
            token_budget=token_budget,
        )
        shape = model_shape(backbone.stock.config)
        blank = rank_rows(
            make_samples, lengths, rows=rows, merge_size=shape.vision.merge_size, max_length=10_000
        )
        rng = np.random.default_rng(0)
        batches = module.collator(validating=False)(
            [[filled(sample, module, rng) for sample in row] for row in blank]
        )
        return Small(
            module=module,
            batches=batches,
            shape=shape,
            tuning=Tuning(ADAPTERS[adapter]),
            works=[work_of(batch, vision=shape.vision, kernel="sdpa") for batch in batches],
            checkpointing=checkpointing,
            decoder=bool(choices.get("patch_ratio")),
        )

    return make


def _backbone(
    family: str, dtype: torch.dtype, adapter: str, checkpointing: bool, text: dict[str, Any]
) -> Backbone:
    model: Any = small_model(family, dtype=dtype, **text)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    backbone = FAMILIES[family](model, FAMILIES[family].image_processor(), kernel="sdpa")
    chosen = ADAPTERS[adapter]
    if chosen is None:
        return FullTuning()(backbone)
    return LowRank(
        rank=chosen.rank,
        alpha=16,
        dropout=chosen.dropout,
        init="gaussian",
        use_dora=chosen.use_dora,
        lean_dora=chosen.lean,
        dropout_on_base=chosen.dropout_on_base,
        target_modules=chosen.targets,
    )(backbone)


def _module(
    backbone: Backbone,
    policy: Policy,
    choices: dict[str, Any],
    *,
    token_budget: int,
) -> StageModule:
    vision = backbone.stock.config.vision_config
    processor: Any = SimpleNamespace(patch_values=3 * vision.patch_size**2, mask_id=VOCABULARY - 1)
    shared: dict[str, Any] = {
        "processor": processor,
        "policy": policy,
        "optimization": Optimization(1e-3, 0.0, (0.9, 0.98), "linear", 0, 1.0),
        "token_budget": token_budget,
        "steps": 1,
        "seed": 0,
    }
    module: StageModule = (
        ReconstructionModule(backbone, patch_weight=0.5, **choices, **shared)
        if choices
        else ContrastiveModule(
            backbone,
            temperature=0.05,
            learn_temperature=False,
            symmetric=False,
            mask_false_negatives=True,
            matryoshka_dims=[],
            similarity_block=1024,
            **shared,
        )
    )
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
    return module.train()


@pytest.fixture(scope="session")
def lengths() -> Lengths:
    """24 words a side and an image of 5 x 6 visual tokens."""
    return LENGTHS
