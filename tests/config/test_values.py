"""A value that cannot be meant is one sentence that names its key, before a model is loaded."""

from __future__ import annotations

import re
from functools import cache

import pytest
from omegaconf import DictConfig, OmegaConf

from cocoa_pl.attention.kernels import KERNELS
from cocoa_pl.config.build import VALUES, build, check_values
from cocoa_pl.errors import UserError
from cocoa_pl.run import build_stages
from tests.configs import composed

CONTRAST = "stage.contrast"
TRAIN = [
    ("model.dtype=float16", "one of float32, bfloat16"),
    ("model.kernel=eager", "one of auto, sdpa, varlen, flash"),
    ("model.max_length=0", "a whole number of at least 1"),
    ("model.max_pixels=null", "a whole number of at least 1"),
    ("model.gradient_checkpointing=maybe", "true or false"),
    ("adapter=lora adapter.rank=0", "a whole number of at least 1"),
    ("adapter=lora adapter.dropout=1.5", "a number of at least 0, below 1"),
    ("adapter=lora adapter.init=xavier", "one of true, false, gaussian, orthogonal"),
    ("adapter=lora adapter.target_modules=[]", "a list of at least one"),
    (f"{CONTRAST}.optimization.schedule=cosin", "one of linear, cosine, cosine_with_restarts, "),
    (f"{CONTRAST}.optimization.betas=[0.9]", "2 values"),
    (f"{CONTRAST}.optimization.lr=abc", "a number above 0"),
    (f"{CONTRAST}.steps=2e3", "a whole number of at least 1 or null"),
    (f"{CONTRAST}.module.temperature=0", "a number above 0"),
    (f"{CONTRAST}.module.matryoshka_dims=64", "a list"),
    ("stage.order=[]", "a list of at least one"),
    ("stage.token_budget=0", "a whole number of at least 1"),
    ("seed=null", "a whole number from 0 to 4294967295"),
    ("stage.clip_norm=-1", "a number of at least 0 or null"),  # trained upwards
    ("stage.clip_norm=.nan", "a number of at least 0 or null"),
    (f"{CONTRAST}.max_rows_per_subset=-1", "a whole number of at least 1 or null"),
    ("num_workers=-1", "a whole number of at least 0"),
    ("cache_dir=null", "a text"),
    ("data.scenes=0", "a whole number of at least 1"),
    ("trainer.num_nodes=0", "a whole number of at least 1"),
    ("trainer.deterministic=perhaps", "one of true, false, warn"),
]
OTHERS = {
    "evaluate": [
        ("batch_tokens=0", "a whole number of at least 1"),
        ("threads=-1", "a whole number of at least 0"),
        ("store_dtype=float8", "one of float16, float32"),
        ("on_bad_row=skp", "one of fail, skip"),
    ],
    "mine": [
        ("negatives=0", "a whole number of at least 1"),
        ("max_of_positive=2", "a number above 0, at most 1"),
    ],
    "plan": [
        ("gpus=0", "a whole number of at least 1 or null"),
        ("lengths.text=2.5", "a whole number of at least 0"),
        ("hardware.memory_gib=0", "a number above 0"),
    ],
    "doctor": [("workers=-1", "a whole number of at least 0 or null")],
}


@cache
def config(name: str, *groups: str) -> DictConfig:
    return composed(*groups, name=name)


@pytest.mark.parametrize(
    ("name", "words", "wanted"),
    [("train", *row) for row in TRAIN]
    + [(name, *row) for name, rows in OTHERS.items() for row in rows],
)
def test_a_value_is_refused_by_its_key(name: str, words: str, wanted: str) -> None:
    *groups, word = words.split()
    key, _, value = word.partition("=")
    said = rf"^{re.escape(key)}(\[\d\])?={re.escape(value)} must be {re.escape(wanted)}"
    with pytest.raises(UserError, match=said.replace("2e3", "2000.0").replace(r"\.nan", "NaN")):
        check_values(OmegaConf.merge(config(name, *groups), OmegaConf.from_dotlist([word])))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("stage.reconstruct.make_samples.sources.query=0.9", "bridge sources must be shares"),
        ("stage.order=[contrast,contrast]", "names a stage twice"),
        ("stage.order=[warmpu]", "order names warmpu; this config holds pretrain, warmup"),
        ("adapter=lora adapter.target_modules=['(a']", "is no regular expression: missing \\)"),
        (
            "adapter=lora adapter.lean_dora=false adapter.dropout_on_base=false",
            "needs adapter.lean",
        ),
    ],
)
def test_what_objects_refuse_needs_no_model(words: str, said: str) -> None:
    cfg = composed(*words.split())
    check_values(cfg)
    with pytest.raises(UserError, match=said):
        _ = build_stages(cfg), build(cfg.adapter)


def test_every_kernel_can_be_chosen() -> None:
    assert set(VALUES["model.kernel"].__args__) == set(KERNELS)
