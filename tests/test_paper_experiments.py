"""`experiment=paper_*` composes to the numbers that the paper and its released code give.

`NUMBERS` repeats them here with their sources, apart from the configs, so that no slip of the hand
in a config passes unseen: P the paper's figures or abstract, C the released code or scripts, D
decided in this project.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import load_inputs
from cocoa_pl.planning.command import make_plan
from cocoa_pl.run import make_processors
from tests.configs import composed

ROOTS = ("data.root=MMEB-train", "benchmark.root=MMEB-eval")

EXPERIMENTS = {
    "paper_qwen2vl_2b": "Qwen/Qwen2-VL-2B-Instruct",
    "paper_qwen25vl_3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "paper_qwen25vl_7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}

# Class., VQA, Retr., Ground., IND, OOD, overall: MMEB-V1, precision@1 x 100, the paper's table.
SCORES = {
    "paper_qwen2vl_2b": (63.0, 57.4, 69.6, 85.8, 70.2, 60.7, 66.0),
    "paper_qwen25vl_3b": (60.9, 63.5, 69.5, 88.2, 72.6, 61.2, 67.5),
    "paper_qwen25vl_7b": (64.7, 66.5, 72.5, 90.1, 75.7, 64.3, 70.6),
}

# Key, value, and source.
NUMBERS: tuple[tuple[str, Any, str], ...] = (
    ("stage.order", ["warmup", "reconstruct", "contrast"], "P"),
    # Stage 1
    ("stage.warmup.policy.name", "bidirectional", "P, C"),
    ("stage.warmup.module.text_ratio", 0.2, "P, C"),
    ("stage.warmup.module.text_segment", "context", "P, C"),
    ("stage.warmup.module.patch_ratio", 0.5, "P"),
    ("stage.warmup.module.patch_weight", 0.5, "C"),
    ("stage.warmup.optimization.lr", 2e-5, "C"),
    ("stage.warmup.optimization.schedule", "linear", "C"),
    ("stage.warmup.optimization.warmup_steps", 100, "C"),
    ("stage.warmup.steps", 3000, "C"),
    ("stage.warmup.epochs", None, "C"),
    ("stage.warmup.batch_size", 128, "C"),
    ("stage.warmup.max_rows_per_subset", 20_000, "C"),
    ("stage.warmup.describing", True, "P"),
    # Stage 2
    ("stage.reconstruct.policy.name", "eos_bridge", "P, C"),
    ("stage.reconstruct.module.text_ratio", 0.7, "C"),
    ("stage.reconstruct.module.text_segment", "target", "P, C"),
    ("stage.reconstruct.module.patch_ratio", 0.0, "P, C"),
    ("stage.reconstruct.make_samples.sources.query", 0.5, "D"),
    ("stage.reconstruct.make_samples.sources.self", 0.5, "D"),
    ("stage.reconstruct.optimization.lr", 2e-5, "C"),
    ("stage.reconstruct.optimization.schedule", "linear", "C"),
    ("stage.reconstruct.optimization.warmup_steps", 100, "C"),
    ("stage.reconstruct.epochs", 2, "C"),
    ("stage.reconstruct.steps", None, "C"),
    ("stage.reconstruct.batch_size", 64, "C"),
    # Stage 3
    ("stage.contrast.policy.name", "bidirectional", "P, C"),
    ("stage.contrast.module.temperature", 0.02, "C"),
    ("stage.contrast.module.symmetric", False, "C"),
    ("stage.contrast.optimization.lr", 2e-5, "C"),
    ("stage.contrast.optimization.schedule", "linear", "C"),
    ("stage.contrast.optimization.warmup_steps", 200, "C"),
    ("stage.contrast.steps", 2000, "C"),
    ("stage.contrast.epochs", None, "C"),
    ("stage.contrast.batch_size", 1024, "C"),
    ("stage.contrast.max_rows_per_subset", 100_000, "C"),
    ("data.max_rows", 100_000, "C"),
    # Everywhere
    ("adapter.rank", 8, "C"),
    ("adapter.alpha", 64, "C"),
    ("adapter.dropout", 0.1, "C"),
    ("adapter.init", "gaussian", "C"),
    ("adapter.use_dora", True, "C"),
    ("model.dtype", "bfloat16", "C"),
    ("model.max_pixels", 336 * 336, "P, D"),
    ("model.eval_max_pixels", 672 * 672, "C"),
    ("model.max_length", 4096, "C"),
    ("model.eos_token", None, "C"),
)


def header(experiment: str) -> str:
    """The comment of the file as running text."""
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ").rstrip() for line in lines if line.startswith("#"))


def test_every_paper_experiment_is_checked() -> None:
    files = (CONFIGS / "experiment").glob("paper_*.yaml")
    assert {path.stem for path in files} == set(EXPERIMENTS) == set(SCORES)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_number_is_the_papers(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}", *ROOTS)
    wrong = []
    for key, value, source in NUMBERS:
        found = OmegaConf.select(cfg, key, throw_on_missing=True)
        plain = OmegaConf.to_object(found) if OmegaConf.is_config(found) else found
        if plain != value:
            wrong.append(f"{key} is {plain}, not {value} ({source})")
    assert wrong == []
    assert cfg.model.source.path == EXPERIMENTS[experiment]
    assert len(cfg.data.subsets) == 20
    assert len(cfg.benchmark.table) == 36


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_header_holds_what_is_known_of_the_run(experiment: str) -> None:
    text = header(experiment)
    assert f"python train.py experiment={experiment} {' '.join(ROOTS)}" in text
    assert EXPERIMENTS[experiment].partition("/")[2] in text
    assert "8 GPUs" in text
    assert "A computed bound, nothing was measured" in text
    *groups, overall = SCORES[experiment]
    assert f"{overall} overall" in text
    for score in groups:
        assert re.search(rf"\b{score}\b", text)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_hours_of_the_header_are_those_of_the_plan(experiment: str) -> None:
    hours = re.search(
        r"at least (?P<h200>[\d.]+) on 8 H200, (?P<h100_80gb>[\d.]+) on 8 H100.*"
        r"warmup (?P<warmup>[\d.]+), reconstruct (?P<reconstruct>[\d.]+), "
        r"contrast (?P<contrast>\d+\.\d)",
        header(experiment),
    )
    assert hours
    for hardware in ("h200", "h100_80gb"):
        words = (f"experiment={experiment}", *ROOTS, "gpus=8", f"hardware={hardware}")
        plan = make_plan(composed(*words, name="plan"))
        assert plan["fits"]
        assert f"{plan['hours']:.1f}" == hours[hardware]
        if hardware == "h200":
            for name, stage in plan["stages"].items():
                assert f"{8 * stage['hours']:.1f}" == hours[name]


def test_the_values_of_the_code_are_one_override_each() -> None:
    """As the header writes them, quotes for the shell taken off; and those beyond the paper."""
    ratio, token = "stage.warmup.module.patch_ratio=0.3", 'model.eos_token="<|endoftext|>"'
    assert ratio in header("paper_qwen2vl_2b")
    assert f"'{token}'" in header("paper_qwen2vl_2b")
    sources = "stage.reconstruct.make_samples.sources={query: 1.0, self: 0.0}"
    policy = "attention@stage.reconstruct.policy=eos_bridge_strict"
    cfg = composed("experiment=paper_qwen2vl_2b", *ROOTS, ratio, token, sources, policy)
    assert cfg.stage.warmup.module.patch_ratio == 0.3
    assert cfg.model.eos_token == "<|endoftext|>"
    assert dict(cfg.stage.reconstruct.make_samples.sources) == {"query": 1.0, "self": 0.0}
    assert cfg.stage.reconstruct.policy.name == "eos_bridge_strict"


def test_another_end_token_is_the_one_that_samples_end_with(tiny_folder: Path) -> None:
    inputs, cfg = load_inputs(tiny_folder), composed()
    own = inputs.tokenizer.eos_token_id
    assert {made.eos_id for made in make_processors(cfg, inputs)} == {own}
    cfg.model.eos_token = "<|endoftext|>"
    other = inputs.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert {made.eos_id for made in make_processors(cfg, inputs)} == {other}
    assert other != own
    cfg.model.eos_token = "dog"
    with pytest.raises(UserError, match=r"model\.eos_token=dog is no special token; there are <"):
        make_processors(cfg, inputs)
