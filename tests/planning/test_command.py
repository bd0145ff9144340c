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

from cocoa_pl import cli
from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.planning.command import run

EPOCHS = {
    "stage": "reconstruct",
    "stage.reconstruct.steps": "null",
    "stage.reconstruct.epochs": "2",
}
HARDWARE = sorted((CONFIGS / "hardware").glob("*.yaml"))


def plan(*overrides: str, width: int = 80) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    status = run(overrides, console)
    printed: Any = console.file
    return status, printed.getvalue()


def test_the_papers_run_fits_eight_gpus(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    status, output = plan("experiment=paper_qwen2vl_2b", "gpus=8", f"json={path}")
    assert status == 0
    assert "It fits" in output
    assert max(len(line) for line in output.splitlines() if "plan.json" not in line) <= 80
    for stage in ("warmup", "reconstruct", "contrast"):
        assert stage in output
    found = json.loads(path.read_text())
    assert found["fits"]
    assert found["parameters"]["model"] == 2_208_985_600
    contrast = found["stages"]["contrast"]
    assert contrast["steps"] == 2000
    # 1024 pairs of a text with an image (40 + 2 + 144 tokens and EOS) and a text (41).
    assert contrast["tokens_per_step"] == 1024 * (187 + 41)
    assert found["gpu_hours"] == pytest.approx(8 * found["hours"])
    assert 5 < found["gpu_hours"] < 100
    assert contrast["chunks_per_gpu"] == 4  # 43 samples with an image fit 8192 tokens


@pytest.mark.slow
def test_auto_is_planned_as_the_kernel_that_it_comes_to(tmp_path: Path) -> None:
    def operations(*overrides: str) -> Any:
        path = tmp_path / "plan.json"
        plan("stage=reconstruct", *overrides, f"json={path}")
        return json.loads(path.read_text())["stages"]["reconstruct"]["flops_per_step_and_gpu"]

    cpu, gpu, half = ("trainer=cpu",), ("trainer=auto",), ("trainer=auto", "model.dtype=bfloat16")
    for where, kernel in ((cpu, "sdpa"), (gpu, "sdpa"), (half, "varlen")):
        assert operations(*where) == operations(*where, f"model.kernel={kernel}")
    assert operations(*half) != operations(*half, "model.kernel=sdpa")


def test_the_default_run_fits_a_cpu() -> None:
    status, output = plan("trainer=cpu", "lengths.image_tokens=4")
    assert status == 0
    assert "1 x cpu (one process), full fine-tuning, products in float32" in output
    assert "2 x 2 = 4 visual" in output


def test_full_tuning_of_7b_on_one_gpu_is_refused_and_helped() -> None:
    status, output = plan(
        *("model=qwen2vl_7b", "data=mmeb", "stage=warmup", "adapter=none", "gpus=1")
    )
    assert status == 1
    assert "It does not fit" in output
    assert "It would with  gpus=2 trainer=fsdp" in output
    assert "It would with  adapter=lora  " in output
    assert "hardware=" not in output  # 134 GiB would hardly fit the 139 of an h200


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpu=8"], r"unknown key gpu \(did you mean gpus\?\)"),
        (["hardware=h100"], "hardware=h100 does not exist"),
        (["gpus=8"], "gpus=8 needs a trainer for several: trainer=ddp or trainer=fsdp"),
        (["trainer=ddp"], "how many GPUs"),
        (["trainer.precision=bf16-mixed"], "trainer.precision=bf16-mixed cannot be planned"),
        (["gpus=0"], "gpus=0 must be a whole number of at least 1 or null"),
        (["lengths.text=900"], "more than model.max_length=256"),
        (["model.source.family=llava"], "model.source.family: there is no llava"),
        (
            [f"{key}={value}" for key, value in EPOCHS.items()],
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
def test_proposed_changes_fit() -> None:
    """The words it prints, given back to it."""
    asked = ["experiment=paper_qwen25vl_7b", "adapter=none", "gpus=8", "hardware=a100_40gb"]
    status, output = plan(*asked, width=200)
    assert status == 1
    lines = [line for line in output.splitlines() if line.startswith("It would with")]
    assert lines
    for line in lines:
        words = line.split("  ")[1].split()
        keys = [word.split("=")[0] for word in words]
        kept = [word for word in asked if word.split("=")[0] not in keys]
        assert plan(*kept, *words)[0] == 0, words


@pytest.mark.slow
def test_every_experiment_of_the_paper_fits_eight_gpus() -> None:
    for path in sorted((CONFIGS / "experiment").glob("paper_*.yaml")):
        status, output = plan(f"experiment={path.stem}", "gpus=8")
        assert status == 0, output


@pytest.mark.slow
def test_the_command_exits_with_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "hardware=nothing"]) == 2
    assert "hardware=nothing does not exist" in capsys.readouterr().err
    assert cli.run(["plan", "stage=contrast", "hardware=rtx4090"]) == 0


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_hardware_names_its_source_and_sane_numbers(path: Path) -> None:
    text, values = path.read_text(), OmegaConf.load(path)
    assert text.startswith("#")
    assert values.name == path.stem
    assert "https://" in text or path.stem == "cpu"
    assert 8 <= values.memory_gib <= 300
    assert 0 < values.tflops.float32 <= values.tflops.bfloat16 < 5000
