"""`cocoa plan` on the configs that ship: what it prints, writes, refuses and returns."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.planning import command
from cocoa_pl.planning.command import run
from tests.configs import composed

HARDWARE = sorted((CONFIGS / "hardware").glob("*.yaml"))
TINY = ("trainer=cpu", "stage=contrast", "lengths.image_tokens=4", "stage.token_budget=4000")


def plan(*overrides: str, width: int = 80) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    status = run(overrides, console)
    printed: Any = console.file
    return status, printed.getvalue()


def planned(path: Path, *overrides: str) -> Any:
    plan(*overrides, f"json={path}")
    return json.loads(path.read_text())


def test_a_run_is_planned_in_80_columns_and_as_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    status, output = plan(*TINY, f"json={path}")
    assert status == 0
    assert "1 x cpu (one process), full fine-tuning, 32-true, without gradient" in output
    assert "It fits" in output
    assert max(len(line) for line in output.splitlines() if "plan.json" not in line) <= 80
    found = json.loads(path.read_text())
    contrast = found["stages"]["contrast"]
    # 128 pairs of a text with an image (40 + 2 + 4 tokens and EOS) and a text (41).
    assert contrast["tokens_per_step"] == 128 * (47 + 41)
    assert contrast["chunks_per_gpu"] == 3
    assert contrast["memory_bytes"]["weights"] > 4 * found["parameters"]["model"]
    for kind in ("flops", "bytes", "kernels"):
        parts = [cost[kind] for cost in contrast["operators"].values()]
        assert contrast[f"{kind}_per_step_and_gpu"] == sum(parts) > 0
    assert found["gpu_hours"] == found["hours"] == contrast["hours"]
    assert found["hours"] == pytest.approx(250 * contrast["seconds_per_step"] / 3600)
    learnt = found["parameters"]["trainable"] + found["parameters"]["heads"]
    assert found["disk_bytes"]["checkpoints"] == 24 * learnt


def test_the_words_that_are_printed_fit() -> None:
    tight = [*TINY, "hardware.memory_gib=1.15"]
    status, output = plan(*tight, width=200)
    assert status == 1
    assert "It does not fit: 1.2 of 1.15 GiB in contrast" in output
    found = re.search("It would with  (.+)", output)
    assert found
    assert plan(*tight, *found[1].split())[0] == 0


@pytest.mark.parametrize(
    ("words", "key", "value", "remedy"),
    [
        (["gpus=2", "trainer=ddp"], "trainer.strategy", "fsdp", "trainer=fsdp"),
        (["adapter=none"], "adapter.rank", 8, "adapter=lora"),
        ([], "model.gradient_checkpointing", True, "model.gradient_checkpointing=true"),
        ([], "stage.contrast.token_budget", 8192, "stage.token_budget=8192"),
        ([], "model.kernel", "nothing", None),
    ],
)
def test_changes_are_tried_in_turn(
    words: list[str], key: str, value: Any, remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fits(cfg: Any) -> Any:
        tried.append(cfg)
        return {"fits": OmegaConf.select(cfg, key) == value}

    monkeypatch.setattr(command, "make_plan", fits)
    found = command.find_remedy(composed("stage=contrast", *words, name="plan"))
    assert found == ([] if remedy is None else [remedy])
    if remedy is None:  # each alone, then all together
        assert len(tried) == 4
        last = tried[-1]
        assert last.model.gradient_checkpointing
        assert (last.adapter.rank, last.stage.contrast.token_budget) == (8, 8192)


def test_fsdp_divides_what_it_splits(tmp_path: Path) -> None:
    words = ("stage=contrast", "gpus=4", "lengths.image_tokens=4")
    whole, split = (
        planned(tmp_path / "plan.json", *words, f"trainer={name}") for name in ("ddp", "fsdp")
    )
    one, quarter = (found["stages"]["contrast"]["memory_bytes"] for found in (whole, split))
    assert quarter["optimizer state"] == pytest.approx(one["optimizer state"] / 4, rel=1e-3)
    assert quarter["weights"] == pytest.approx(one["weights"] / 4, rel=0.01)
    assert quarter["gathered blocks (assumed)"] > 0
    assert "FSDP2" in split["setup"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpus=8"], "gpus=8 needs a trainer for several: trainer=ddp or trainer=fsdp"),
        (["trainer=ddp"], "how many GPUs"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed cannot be honoured"),
        (["gpus=0"], "gpus=0 must be a whole number of at least 1 or null"),
        (["model.source.family=llava"], "model.source.family=llava must be one of qwen2_vl"),
        (["model=qwen2vl", "model.source.path=a/b"], "no config.json for a/b"),
        (["lengths.images_per_positive=1"], "stage pretrain describes images, and of the assumed"),
        (["lengths.images_per_query=20"], "images and the end token take .* max_length=256"),
        (
            ["stage=reconstruct", "stage.reconstruct.steps=null", "stage.reconstruct.epochs=2"],
            "stage reconstruct counts epochs; say of how many rows: lengths.rows=100000",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*overrides)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_full_tuning_of_a_large_model_is_refused_and_helped() -> None:
    """Of a model whose files are not here."""
    words = ("model=qwen2vl", "data=mmeb", "adapter=none", "stage=warmup", "hardware=rtx4090")
    status, output = plan(*words, "trainer=ddp", "gpus=8", width=200)
    assert status == 1
    assert "It would with  trainer=fsdp" in output
    status, output = plan(*words, width=200)
    assert status == 1
    assert "It would with  adapter=lora" in output


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_hardware_names_its_source_and_sane_numbers(path: Path) -> None:
    text, values = path.read_text(), OmegaConf.load(path)
    assert text.startswith("#")
    assert values.name == path.stem
    assert "https://" in text or path.stem == "cpu"
    assert 8 <= values.memory_gib <= 300
    assert 0 < values.tflops.float32 <= values.tflops.bfloat16 < 5000
    assert 0 < values.bandwidth < 20
