"""Overrides for the smallest run that works, and models of any size without weights."""

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig

STAGES = ("pretrain", "warmup", "reconstruct", "contrast")
SMALL_DIGITS = ["data.scenes=60", "data.task_rows=20", "data.validation_rows=25"]
SMALL_BENCHMARK = ["benchmark.scenes=60", "benchmark.task_rows=12"]
SMALL_TRAINING = [
    *(f"stage.{stage}.steps=2" for stage in STAGES),
    *(f"stage.{stage}.optimization.warmup_steps=2" for stage in STAGES),
    *(f"stage.{stage}.batch_size=8" for stage in STAGES),
    "model.source.text.hidden_size=32",
    "model.source.text.intermediate_size=48",
    "model.source.text.num_hidden_layers=1",
    "model.source.text.rope_parameters.mrope_section=[1,1,2]",
    "model.source.vision.depth=1",
    "model.source.vision.embed_dim=32",
    "logger=none",
    "trainer=cpu",
    "num_workers=0",
]


def meta_model(config: PretrainedConfig) -> nn.Module:
    """The stock generative model on the meta device: every name, shape and dtype, no memory."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config)
    return model
