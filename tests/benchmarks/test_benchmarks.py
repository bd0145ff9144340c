"""Every benchmark at test size: equal results, counts, its record; and what measures them. No test
looks at times.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import ROOT, measure, parts, whole
from benchmarks.__main__ import main, page
from benchmarks.measure import (
    BENCHMARKS,
    SIZES,
    TABLE,
    Task,
    agreed,
    alternate,
    assert_equal,
    count,
    figures,
    matrix_product_ceiling,
)
from cocoa_pl.config.command_line import compose_overrides

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("name", BENCHMARKS)
RECREATED = {"reconstruct_step"}  # no package has such a step

# By benchmark: counts, and how many times as much the peer has at test size at least.
GATES: dict[str, dict[str, float]] = {
    "contrast_step": {"flops": 1.05, "kernels": 1.2, "token_slots": 1.1, "peak_bytes": 1.3},
    "encode": {"flops": 1.1, "kernels": 2.4, "passes": 2, "token_slots": 1.2},
    "reconstruct_step": {"flops": 1.4, "peak_bytes": 4},
    "masked_head": {"flops": 20, "peak_bytes": 20},
    "attention_bridge": {"flops": 3, "peak_bytes": 2},
    "dora": {"flops": 1.7, "peak_bytes": 1.2},
    "scoring": {},  # numpy's work is not counted
}


def measured(name: str, device: torch.device = CPU, **changes: Any) -> dict[str, Any]:
    return measure.measure(
        name,
        {**BENCHMARKS[name], **changes},
        size="test",
        device=device,
        seconds=0,
        min_pairs=1,
        ceiling=matrix_product_ceiling(device, side=64),
    )


@cache
def record_of(name: str) -> dict[str, Any]:
    return measured(name)


# --- Every benchmark ---------------------------------------------------------------------------


@EVERY
def test_both_sides_agree_and_the_record_has_the_public_keys(name: str) -> None:
    record = json.loads(json.dumps(record_of(name), allow_nan=False))
    assert "error" not in record
    assert record["name"] == name
    assert record["unit"] == "seconds"
    assert record["ratio"] == pytest.approx(record["peer"] / record["ours"])  # of one pair
    assert all(count.keys() == {"ours", "peer", "ratio"} for count in record["counts"].values())
    assert {"device", "torch", "commit", "date", "threads"} <= record["environment"].keys()
    assert ("re-created" in record["peer_label"]) == (name in RECREATED)


@EVERY
def test_counts_pass_their_gates(name: str) -> None:
    counts = record_of(name)["counts"]
    for what, least in GATES[name].items():
        assert counts[what]["ratio"] >= least, (what, counts[what])


@EVERY
def test_half_precision_is_compared_in_float32_first(name: str) -> None:
    sizes, exact = BENCHMARKS[name]["sizes"], BENCHMARKS[name]["exact"]
    assert sizes.keys() == set(SIZES)
    for size, values in sizes.items():
        if values.get("dtype") == "bfloat16":
            assert exact[size]["dtype"] == "float32"
        if values.get("dropout"):
            assert exact[size]["dropout"] == 0


def test_rows_of_every_size_fit_its_model() -> None:
    for benchmark in BENCHMARKS.values():
        for values in benchmark["sizes"].values():
            if "model" in values:
                model = compose_overrides("train", TABLE["models"][values["model"]]).model
                assert values["side"] ** 2 <= model.max_pixels
                assert (values["side"] / 28) ** 2 + 100 <= model.max_length  # and words


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in BENCHMARKS if "cuda" in BENCHMARKS[n]["exact"]])
def test_the_types_of_a_gpu_agree_too(name: str) -> None:
    """What `--device cuda` runs, but for the device and the kernel that `auto` finds there."""
    benchmark = BENCHMARKS[name]
    sizes = {"test": {**benchmark["sizes"]["test"], "dtype": "bfloat16"}}
    exact = {"test": {**benchmark["exact"].get("test", {}), "dtype": "float32"}}
    agreed({**benchmark, "sizes": sizes, "exact": exact}, "test", CPU)


@pytest.mark.gpu
@EVERY
def test_a_gpu_gives_the_same_records(name: str) -> None:
    record = measured(name, torch.device("cuda"))
    assert "error" not in record
    assert "skipped" in record or record["ours"] > 0
    assert record["environment"]["device_type"] == "cuda"


def test_gradients_of_all_weights_are_compared() -> None:
    values = {**BENCHMARKS["contrast_step"]["sizes"]["test"], "pairs": 4, "dtype": torch.float32}
    task = whole.contrast_step(**values, device=CPU)
    (ours, peer), model = (task.ours(), task.peer()), task.models[1]
    assert model is not None
    assert len(ours["gradients"]) == len(peer["gradients"]) > 40
    assert sum(p.numel() for p in model.parameters()) < sum(g.numel() for g in peer["gradients"])


def test_scoring_has_hits_and_misses() -> None:
    task = parts.scoring(**BENCHMARKS["scoring"]["sizes"]["test"], device=CPU)
    (gains,) = task.peer()["nDCG@10"]
    assert 0.1 < (gains == 1).float().mean() < 0.9
    assert len(gains.unique()) > 3


# --- Measuring ---------------------------------------------------------------------------------


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = parts.masked_next_token

    def wrong(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, hits = right(logits, targets)
        return losses * 1.01, hits

    monkeypatch.setattr(parts, "masked_next_token", wrong)
    record = measured("masked_head")
    assert record["error"].startswith("AssertionError: loss differs by 0.01 of its norm")
    assert record["ours"] is record["peer"] is record["ratio"] is None
    # What bfloat16 hides is noticed in float32.
    half = {"test": {**BENCHMARKS["masked_head"]["sizes"]["test"], "dtype": "bfloat16"}}
    assert "error" not in measured("masked_head", sizes=half, exact={})
    exact = {"test": {"dtype": "float32"}}
    assert measured("masked_head", sizes=half, exact=exact)["error"] == record["error"]


def test_results_are_compared_by_name_as_a_whole() -> None:
    one, tiny = torch.ones(3), torch.tensor([1e-9])
    assert_equal({"x": [one, tiny]}, {"x": [one, -tiny]}, dtype=torch.float32)  # rounding of a zero
    for other, message in (
        ({"x": [2 * one, tiny]}, "x differs by 1 of its norm"),
        ({"x": [one, torch.tensor([torch.nan])]}, "x is not finite"),
        ({"x": [one]}, "shapes of x differ"),
        ({"y": [one, tiny]}, "'y'"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_equal(other, {"x": [one, tiny]}, dtype=torch.float32)


def test_a_peer_that_is_not_installed_is_skipped_with_a_word() -> None:
    record = measured("dora", package="no_such_package")
    assert record["skipped"] == "no_such_package is not installed"
    assert record["ratio"] is None
    assert page([record]) == page([])


def test_passes_of_a_model_and_their_token_slots_are_counted() -> None:
    class Layer(nn.Module):
        def forward(self, *, inputs_embeds: Tensor) -> Tensor:
            return inputs_embeds @ torch.ones(5, 7)

    layer = Layer()
    found = count(lambda: [layer(inputs_embeds=torch.ones(2, 3, 5)) for _ in range(4)], layer)
    assert (found["passes"], found["token_slots"]) == (4, 4 * 2 * 3)
    assert found["flops"] == 4 * 2 * (2 * 3) * 5 * 7


@pytest.mark.parametrize(
    ("pairs", "limits"),
    [(4, {"seconds": 0, "min_pairs": 4}), (5, {"seconds": 60, "min_pairs": 1, "max_pairs": 5})],
)
def test_runs_alternate_until_the_time_is_over_but_not_before_the_least_number(
    pairs: int, limits: dict[str, Any]
) -> None:
    order: list[str] = []
    task = Task(1, lambda: order.append("ours"), lambda: order.append("peer"))  # type: ignore
    assert len(alternate(task, device=CPU, **limits)) == pairs
    assert order == (["peer", "ours", "ours", "peer"] * 3)[: 2 * pairs]


def test_the_ratio_is_taken_within_pairs_with_an_interval() -> None:
    """While the machine is slow, both are: the ratio of medians would be 1.5 here."""
    task = Task(12, dict, dict)
    found = figures(task, [(1.0, 2.0), (2.0, 3.0), (10.0, 20.0)])
    assert (found["ratio"], found["ours"], found["peer"]) == (2.0, 2.0, 3.0)
    assert found["samples_per_second"] == {"ours": 6.0, "peer": 4.0}
    assert found["ci"] == [1.5, 2.0]
    assert figures(task, [(1.0, 3.0)] * 9)["ci"] == [3.0, 3.0]


# --- The command line and the page -------------------------------------------------------------

QUICK = ["--size", "test", "--pairs", "1", "--seconds", "0"]


def test_one_name_writes_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deeper" / "one.json"
    main(["masked_head", "--json", str(file), *QUICK])
    written = json.loads(file.read_text())
    assert {"name", "ours", "peer", "ratio", "unit", "counts"} <= written.keys()
    line = capsys.readouterr().out.splitlines()[-1]
    assert all(part in line for part in ("masked_head", "tokens/s", "1 pairs"))


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory.\nAsk less"), KeyboardInterrupt]
)
def test_an_error_ends_one_benchmark_and_loses_no_other(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two: the second fails, or is interrupted."""

    def failing(**_: Any) -> Any:
        raise error

    two = {name: BENCHMARKS[name] for name in ("masked_head", "dora")}
    monkeypatch.setattr("benchmarks.__main__.BENCHMARKS", two)
    monkeypatch.setattr(parts, "dora", failing)
    file, out = tmp_path / "several.json", tmp_path / "results.md"
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        main(["all", "--json", str(file), *QUICK])
    records = {one["name"]: one for one in json.loads(file.read_text())["results"]}
    assert records["masked_head"]["ratio"] > 0
    if error is KeyboardInterrupt:
        assert records.keys() == {"masked_head"}
        return
    assert caught.value.code == 1
    assert records["dora"]["error"] == "RuntimeError: CUDA out of memory."
    main(["page", str(file), "--out", str(out)])
    assert "**failed**" in out.read_text()
    assert records["dora"]["error"] in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["dora", "--pairs", "0"], "--pairs must be at least 1"),
        (["page", "gone.json"], "gone.json does not exist; write it with"),
        (["dora", "--device", "cuda"], "torch sees no CUDA device here"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_page_says_what_is_not_measured() -> None:
    text = page([{**record_of("masked_head"), "size": "cpu"}])
    (missing,) = [line for line in text.splitlines() if "Not measured" in line]
    assert "`contrast_step`" in missing
    assert "masked_head" not in missing


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    expected = page([json.loads(file.read_text()) for file in files])
    assert (ROOT / "benchmarks" / "results.md").read_text() == expected
