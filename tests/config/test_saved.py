"""A resumed run keeps its config, and a new one has the settings of the model it starts from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from cocoa_pl.config.saved import resumed_config, settings_of, settled
from cocoa_pl.errors import UserError
from cocoa_pl.models.exported import FORMAT, write_description
from tests.attention.oracle import OURS
from tests.configs import composed, started

# Of an exported model, beside its settings.
DESCRIBED = {
    **{"format": FORMAT, "lineage": [], "policy": OURS["bidirectional"].to_dict()},
    **{"max_length": 256, "min_pixels": 784, "max_pixels": 12544, "dtype": "float32"},
    **{"rounding": 0.0, "fingerprint": [[0.0]]},
}


@pytest.fixture(scope="module")
def trained() -> DictConfig:
    """What a run of another family was trained with."""
    words = ["stage.contrast.optimization.lr=0.5", "model.max_pixels=4096"]
    return composed("model=tiny_qwen3vl", *words)


def save_config(cfg: DictConfig, folder: Path) -> None:
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)


@pytest.fixture
def exported(trained: DictConfig, tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of Qwen2-VL's family, whatever its settings say."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(tiny_folder / "config.json")
    plain: Any = OmegaConf.to_container(trained, resolve=True)
    write_description(folder, {**DESCRIBED, "settings": settings_of(plain)})
    return folder


@pytest.fixture
def run(trained: DictConfig, exported: Path) -> Path:
    """The folder of the run that exported the model."""
    save_config(trained, exported.parent)
    return exported.parent


def settled_by(*overrides: str) -> Any:
    """The config of a run that these words start."""
    with started(*overrides) as cfg:
        return settled(cfg)


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_a_run_starts_with_the_settings_of_its_model(
    kind: str, request: pytest.FixtureRequest, trained: DictConfig
) -> None:
    folder = request.getfixturevalue(kind)
    cfg = settled_by(f"init_from={folder}", "stage=contrast", "seed=3")
    assert (cfg.model.min_pixels, cfg.model.max_pixels) == (1024, 4096)
    assert cfg.model.eval_max_pixels == 16384
    assert cfg.stage == {**trained.stage, "order": ["contrast"]}
    assert cfg.stage.contrast.optimization.lr == 0.5
    assert (cfg.seed, list(cfg.stage.order)) == (3, ["contrast"])
    assert ("family" in cfg.model.source) == (kind == "run")


def test_what_the_user_and_his_experiment_say_comes_first(run: Path) -> None:
    cfg = settled_by(f"init_from={run}", "model.max_pixels=2048", "schedule=paper")
    assert (cfg.model.min_pixels, cfg.model.max_pixels) == (1024, 2048)
    assert cfg.stage.contrast.optimization.lr == 2e-5
    words = ["experiment=ablation", "arm=causal", "stage.weight_decay=0.25"]
    cfg = settled_by(*words, f"init_from={run}")
    assert (cfg.stage.contrast.steps, cfg.stage.contrast.optimization.lr) == (100, 0.5)
    assert cfg.stage.weight_decay == 0.25


def test_a_model_that_is_chosen_is_taken_where_it_fits(run: Path, tiny_folder: Path) -> None:
    cfg = settled_by(f"init_from={tiny_folder}", "model=tiny")
    assert (cfg.model.min_pixels, cfg.stage.contrast.optimization.lr) == (784, 2e-3)
    with pytest.raises(UserError, match=r"model=tiny_qwen3vl does not fit .* qwen2_vl of width 32"):
        settled_by(f"init_from={run}", "model=tiny_qwen3vl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init_from=Qwen/Qwen3-VL-2B-Instruct"], "; add model=qwen3vl_2b or model=qwen3vl_4b or "),
        (["init_from=TINY"], "add model=qwen2vl or model=qwen2vl_7b or model=tiny$"),
        (["init_from=ADAPTER"], "does not tell .*; add model=qwen25vl_3b or model=qwen25vl_7b$"),
        (
            ["init_from=Qwen/Qwen2-VL-2B-Instruct", "model=tiny"],
            "model=tiny does not fit .* of width 1536; add model=qwen2vl or model=qwen2vl_7b$",
        ),
    ],
)
def test_a_model_without_settings_needs_one_of_the_options_that_fit(
    words: list[str], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    described = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    places = {"TINY": str(tiny_folder), "ADAPTER": str(tmp_path)}
    overrides = [key + "=" + places.get(name, name) for key, _, name in map(halves, words)]
    with pytest.raises(UserError, match=message):
        settled_by(*overrides)


def test_an_adapter_whose_base_lies_elsewhere_fits_a_copy_of_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    described = {"base_model_name_or_path": f"/their/{tiny_folder.name}", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    words = [f"init_from={tmp_path}", "model=qwen2vl"]
    assert settled_by(*words, f"model.source.path={tiny_folder}").model.source.path == str(
        tiny_folder
    )
    with pytest.raises(UserError, match=f"is not here; pass a copy as .*{tiny_folder.name}$"):
        settled_by(*words)


@pytest.mark.parametrize(
    ("section", "changed", "said"),
    [
        ("model", {}, "model.min_pixels has no value; give it as"),
        ("model", {"max_pixels": "many"}, "model.max_pixels=many must be a whole number"),
        ("stage", {"contrast": {"optimization": None}}, "optimization holds several values"),
        (
            "stage",
            {"contrast": {"optimization": {"lrr": 3}}},
            r"unknown key .*\.lrr \(did you mean lr",
        ),
    ],
)
def test_settings_that_were_edited_are_refused(
    section: str, changed: dict[str, Any], said: str, exported: Path
) -> None:
    described = json.loads((exported / "cocoa.json").read_text())
    described["settings"][section] = described["settings"][section] | changed if changed else {}
    write_description(exported, described)
    with pytest.raises(UserError, match=said):
        settled_by(f"init_from={exported}")


def halves(word: str) -> tuple[str, str, str]:
    return word.partition("=")


def test_a_resumed_run_keeps_its_config(tmp_path: Path) -> None:
    save_config(composed("seed=5", "stage=contrast", "evaluate=true", "trainer=ddp"), tmp_path)
    given = [f"resume={tmp_path}", "num_workers=3", "logger=wandb", "evaluate=false"]
    given += ["logger.wandb.offline=true", "+trainer.max_steps=9"]
    given.append("init_from=moved")  # where it lies by now; `check_base` tells whether it is that
    resumed = resumed_config(composed(*given), given)
    assert (resumed.seed, list(resumed.stage.order)) == (5, ["contrast"])
    assert (resumed.num_workers, resumed.evaluate, resumed.init_from) == (3, False, "moved")
    assert resumed.logger == composed("logger=wandb", "logger.wandb.offline=true").logger
    assert (resumed.trainer.strategy, resumed.trainer.max_steps) == ("ddp", 9)
    assert resumed.resume == str(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        "seed=6",
        "stage=warmup",
        "num_workerss=1",
        "~logger",
    ],
)
def test_a_resumed_run_cannot_become_another(changed: str, tmp_path: Path) -> None:
    save_config(composed("seed=5"), tmp_path)
    given = [f"resume={tmp_path}", changed]
    with pytest.raises(UserError, match=f"keeps its config; {re.escape(changed)} cannot"):
        resumed_config(composed(given[0]), given)


def test_runs_and_exports_of_an_earlier_version_do_not_tell_their_settings(
    run: Path, exported: Path
) -> None:
    old = OmegaConf.load(run / "config.yaml")
    OmegaConf.save({**old, "schedule": {"contrast": {"lr": 0.5}}}, run / "config.yaml")
    with pytest.raises(UserError, match=r"an earlier version .*; init_from=.* begins a new run"):
        resumed_config(composed(f"resume={run}"), [f"resume={run}"])
    described = {**DESCRIBED, "settings": {"model": {}, "schedule": {}}}
    write_description(exported, described)
    for folder in (run, exported):  # which is the run's own
        with pytest.raises(UserError, match=r"does not tell .*; add model=qwen2vl or "):
            settled_by(f"init_from={folder}")


@pytest.mark.parametrize(
    "content", ["a: [", "[1]", "stage: 3", "stage: {order: []}", "data: null", "model: {source: 3}"]
)
def test_a_damaged_config_of_a_run_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    given = [f"resume={tmp_path}"]
    with pytest.raises(UserError, match=r"config\.yaml is (damaged|no configuration)"):
        resumed_config(composed(*given), given)
