"""Configs are strict: what is written in YAML or typed is exactly what the code takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import reduce
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf, open_dict

from cocoa_pl.config.build import build, callables, check_values, declared
from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.config.saved import DEFAULT_MODEL
from cocoa_pl.distributed import collectives
from cocoa_pl.errors import UserError
from cocoa_pl.run import build_stages, scoring_device, trainer_parts
from tests.configs import composed, started

ROOT = CONFIGS.parent
GROUPS = (
    *("adapter", "arm", "benchmark", "data", "experiment"),
    *("callbacks", "logger", "model", "schedule", "stage", "trainer"),
)
PLACED = {
    "attention": "attention@stage.contrast.policy",
    "mixing": "mixing@stage.contrast.mixing",
}
# What the code fills in where a config is marked `_partial_`.
PIECES = {"backbone", "shared"}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def choices() -> list[list[str]]:
    """Every file of every group, as it is chosen on a command line. Groups that decide which other
    keys there are stand alone, of the rest each gives one to a command line.
    """
    alone = ("arm", "experiment", "stage")
    single = [[f"{group}={option}"] for group in alone for option in options(group)]
    single = [["experiment=ablation"] * one[0].startswith("arm") + one for one in single]
    keys = {group: group for group in GROUPS if group not in alone} | PLACED
    rest = [[f"{key}={option}" for option in options(group)] for group, key in keys.items()]
    return [*single, *([one for one in chosen if one] for chosen in zip_longest(*rest))]


def targets(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place of a config that makes an object."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from targets(value, f"{where}.{key}")


def test_every_group_of_configs_is_covered() -> None:
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == {
        *GROUPS,
        *PLACED,
        "cluster",  # see below
        "hydra",  # of Hydra itself
        "hardware",  # of `cocoa plan`
    }


def test_a_cluster_runs_one_process_for_each_gpu_of_the_trainers_nodes() -> None:
    chosen = [
        "cluster=slurm",
        "trainer=ddp",
        "trainer.num_nodes=3",
        "hydra.launcher.gpus_per_node=4",
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=chosen, return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (3, 4, 4)


@pytest.mark.parametrize("chosen", choices(), ids=" ".join)
def test_every_config_composes_names_what_constructors_take_and_builds(
    chosen: list[str], tmp_path: Path
) -> None:
    """Required means required: keys are the constructor's parameters, no more and no fewer."""
    cfg = composed(*chosen)
    plain = OmegaConf.to_container(cfg, resolve=False)
    found = list(targets(plain))
    assert found
    for where, node in found:
        made = get_object(node["_target_"])
        parameters = inspect.signature(made).parameters
        keys = {key for key in node if not key.startswith("_")}
        if node["_target_"].startswith("lightning."):
            assert keys <= parameters.keys() or "kwargs" in parameters, where
        else:
            wanted = parameters.keys() - (PIECES if "_partial_" in node else set())
            assert keys == wanted, where
    assert [made.name for made in build_stages(cfg)] == list(cfg.stage.order)
    is_named_arm = chosen[-1].startswith("arm=") and chosen[-1] != "arm=from_base"
    assert bool(cfg.arm_name) == is_named_arm
    assert callable(build(cfg.adapter))
    assert callable(build(cfg.trainer))
    if not {"logger=wandb", "logger=mlflow"} & {*chosen}:  # need packages
        assert trainer_parts(cfg, tmp_path, "warmup")


EXAMPLES = f"hydra.searchpath=[{ROOT / 'docs' / 'examples' / 'conf'}]"


@pytest.mark.parametrize(
    ("name", "words", "benchmark", "temperature"),
    [
        ("train", [], "digits", 0.07),
        ("train", ["model=qwen2vl_7b", "data=pairs"], "held_out", 0.02),
        ("train", ["model=qwen2vl", "schedule=tiny", "benchmark=mteb"], "mteb", 0.07),
        ("train", ["data=paper", "data@data.stages.warmup=digits"], "held_out", 0.07),
        ("train", ["data=colours", EXAMPLES], "held_out", 0.07),
        ("evaluate", [], "digits", None),
        ("evaluate", ["data=pairs"], "held_out", None),
        ("mine", [], None, None),
    ],
)
def test_data_choose_their_benchmark_and_a_model_its_schedule(
    name: str, words: list[str], benchmark: str | None, temperature: float | None
) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(name, overrides=words, return_hydra_config=True)
    assert cfg.hydra.runtime.choices.benchmark == benchmark
    assert OmegaConf.select(cfg, "stage.contrast.module.temperature") == temperature
    if name == "train" and not words:
        assert cfg.hydra.runtime.choices.model == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("stage.contrast.optimization.lrr", r"unknown key .*\.lrr \(did you mean lr\?\)"),
        ("stage.contrast.module.steps", "unknown key stage.contrast.module.steps"),  # filled in
        ("trainer.max_stepss", r"unknown key .* \(did you mean max_steps\?\)"),
        ("data.foo", "unknown key data.foo; there are cache_dir, "),
        ("stage.contrst.steps", r"unknown key stage\.contrst \(did you mean contrast\?\)"),
    ],
)
def test_a_key_that_nothing_takes_is_named(key: str, message: str) -> None:
    """Whichever file it stands in; on a command line Hydra refuses it already."""
    cfg = composed()
    OmegaConf.update(cfg, key, 1, force_add=True)
    with pytest.raises(UserError, match=message):
        check_values(cfg)


def test_a_key_that_is_needed_is_named() -> None:
    cfg = composed()
    with open_dict(cfg):
        del cfg.data.scenes
    with pytest.raises(UserError, match=r"data\.scenes is missing, which cocoa_pl\.data\.digits\."):
        check_values(cfg)
    with pytest.raises(UserError, match=r"data\.path has no value; give it as data\.path="):
        build(composed("data=pairs").data)


def test_typed_values_of_a_stage_that_does_not_run_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["attention@stage.reconstruct.policy=causal", "stage.warmup.steps=3"]
    for chosen in (["stage=contrast"], ["arm=control", "init_from=null"]):
        with started(*chosen, *words) as cfg:
            build_stages(cfg)
    assert caplog.messages == [
        "attention@stage.reconstruct.policy=causal has no effect: stage.order is [contrast]",
        "stage.warmup.steps=3 has no effect: stage.order is [contrast]",
        "attention@stage.reconstruct.policy=causal has no effect: "
        "stage.order is [pretrain, contrast]",  # whose steps are warmup's and reconstruct's
    ]


# Read by others, who refuse what they do not understand: Lightning, transformers, jinja.
NOT_OURS = ("trainer.", "model.source.text.", "model.source.vision.", "hydra.", "benchmark.publ")


def numbers(plain: Any, where: str = "") -> Iterator[str]:
    """Keys of the numbers that are written in a config."""
    for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain):
        if isinstance(value, dict | list):
            yield from numbers(value, f"{where}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{where}{key}"


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        # `plan` and `doctor` hold all of `train`; data=paper reads by two readers.
        ("plan", ["adapter=dora", "mixing@stage.contrast.mixing=interleaved"]),
        ("doctor", ["data=paper", "model=qwen3vl_2b", "benchmark=mteb"]),
        *(("train", [f"data={data}"]) for data in ("pairs", "mmeb_stream")),
        *((name, []) for name in ("evaluate", "mine")),
    ],
)
def test_every_number_of_a_config_has_bounds(name: str, chosen: list[str]) -> None:
    cfg = composed(*chosen, name=name)
    check_values(cfg)
    plain = OmegaConf.to_container(cfg, resolve=False)
    bounded = [key for key, kind in declared(callables(plain)).items() if "Bounds" in repr(kind)]
    # What they refer to is bounded too: `${stage.clip_norm}`.
    written = [reduce(lambda node, part: node.get(part, {}), k.split("."), plain) for k in bounded]
    bounded += re.findall(r"'\$\{(\w[\w.]*)\}'", str(written))
    free = [key for key in numbers(plain) if not f"{key}.".startswith((*NOT_OURS, *bounded))]
    assert free == []


@pytest.mark.parametrize("value", [None, 0])
def test_no_clipping_is_null_or_zero(value: int | None) -> None:
    cfg = composed()
    cfg.stage.clip_norm = value
    check_values(cfg)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert collectives.clip_gradients([weight], build_stages(cfg)[0].optimization.clip_norm) == 5
    assert weight.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage.warmup.optimization.warmup_steps": 101}, "a warm-up of 101 .* than its 100 steps"),
        ({"stage.weight_decay": 1e3}, "would turn the sign of every weight"),
        ({"model.eval_max_pixels": 783}, r"model\.eval_max_pixels must be at least .*=784"),
    ],
)
def test_what_makes_no_sense_together_is_refused_before_anything_is_loaded(
    values: dict[str, Any], message: str
) -> None:
    cfg = composed()
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=message):
        _ = check_values(cfg), build_stages(cfg)


@pytest.mark.parametrize(
    ("trainer", "device"), [("cpu", "cpu"), ("auto", "cuda"), ("fsdp", "cuda")]
)
def test_a_model_is_scored_where_it_was_trained(
    trainer: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert scoring_device(composed(f"trainer={trainer}")) == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scoring_device(composed(f"trainer={trainer}")) == "cpu"


def test_what_a_constructor_refuses_keeps_its_kind() -> None:
    node = {"_target_": "cocoa_pl.data.images.resolve_image", "relative": "/a.png", "root": "."}
    with pytest.raises(UserError, match="is absolute") as caught:
        build(node)
    assert (caught.value.kind, caught.value.file) == ("path_outside_root", "/a.png")
