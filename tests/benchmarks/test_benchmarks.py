"""Every benchmark at test size: equal results, exact counts, the keys of its JSON. Times are in the
slow test alone.
"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    attention_bridge,
    command,
    contrast,
    encoding,
    masked_head,
    rebuilding,
    scoring,
    similarities,
    step_sizes,
    training,
    vision_attention,
)
from benchmarks.attention_bridge import policy
from benchmarks.benchmark import (
    CUDA_IN_FLOAT32,
    GIB,
    RE_CREATION,
    SIZES,
    Benchmark,
    Effort,
    assert_fits,
    measure,
)
from benchmarks.command import EFFORT, run
from benchmarks.comparing import assert_close
from benchmarks.counting import Count, Counts, cost_of
from benchmarks.machine import ROOT, environment, matrix_product_ceiling
from benchmarks.registry import BENCHMARKS, find, names
from cocoa_pl.attention import dense_mask

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)

WITH_A_MODEL = ("_step", "gradient_cache", "packing", "encode")

# By benchmark: counts, and how many times as much the peer has at test size at least.
GATES: dict[str, dict[str, float]] = {
    "masked_head": {"head_rows": 20, "flops": 20, "peak_saved_bytes": 20},
    "attention_bridge": {"scores": 1.5, "flops": 1.5, "token_slots_per_real_token": 1.5},
    "vision_attention": {"scores": 8, "flops": 6, "peak_saved_bytes": 4},
    "vision_attention_4d": {"scores": 8, "flops": 6, "peak_saved_bytes": 4},
    "dora": {"norms_taken": 4, "flops": 1.6},
    "dora_same_dropout": {"norms_taken": 4},
    "images": {"bytes_to_the_device": 8},
    "images_672": {"bytes_to_the_device": 8},
    "images_on_one_core": {"bytes_to_the_device": 8},
    "images_whole_path": {"bytes_to_the_device": 8},
    "packing": {"token_slots_per_real_token": 2.5, "flops": 2.5, "model_calls": 1},
    "gradient_cache": {"model_calls": 1.3, "flops": 1.25},
    "scoring": {},
    "scoring_shared": {},
    "similarities": {"similarities": 4, "flops": 3, "peak_bytes": 3},
    "warmup_step": {"head_rows": 10, "flops": 2, "peak_saved_bytes": 1.3},
    "reconstruct_step": {"head_rows": 3, "flops": 1.6, "peak_saved_bytes": 2},
    "contrast_step": {"token_slots_per_real_token": 1.3, "flops": 2, "peak_saved_bytes": 1.3},
    "encode": {"flops": 1.05},
}


@cache
def counted(name: str) -> Counts:
    (benchmark,) = (one for one in BENCHMARKS if one.name == name)
    return benchmark.build(benchmark.sizes["test"], CPU).counts()


@EVERY
def test_both_sides_give_the_same(benchmark: Benchmark) -> None:
    benchmark.build(benchmark.sizes["test"], CPU).check()


@EVERY
def test_counts_pass_their_gates(benchmark: Benchmark) -> None:
    for name, least in GATES[benchmark.name].items():
        ratio = counted(benchmark.name)[name].ratio
        assert ratio is not None
        assert ratio >= least, (name, ratio)


@EVERY
def test_every_benchmark_has_all_sizes_and_describes_its_peer(
    benchmark: Benchmark,
) -> None:
    half = ["bfloat16" in str(benchmark.sizes[name]) for name in SIZES]
    assert half == [name == "cuda" and CUDA_IN_FLOAT32 in benchmark.sizes for name in SIZES]
    assert "bfloat16" not in str(benchmark.sizes.get(CUDA_IN_FLOAT32))
    assert len(benchmark.peer_label) > 20
    assert all(set(curve.points) == set(SIZES) for curve in benchmark.curves)


def test_bytes_of_images_are_exactly_an_eighth() -> None:
    for benchmark in find("B6"):
        assert counted(benchmark.name)["bytes_to_the_device"].ratio == 8


def test_what_a_rank_keeps_for_similarities_grows_linearly_with_the_batch() -> None:
    kept = [
        similarities.Similarities(replace(similarities.TEST, batch=batch, block=32), CPU).counts()
        for batch in (256, 512, 1024)
    ]
    for small, large in pairwise(kept):
        assert large["peak_bytes"].ours <= 2.2 * small["peak_bytes"].ours
        assert large["peak_bytes"].peer >= 3.5 * small["peak_bytes"].peer


@pytest.mark.parametrize(
    ("task", "sizes"),
    [(contrast.Contrast, step_sizes.CONTRAST), (encoding.Encode, step_sizes.ITEMS)],
    ids=["contrast", "encode"],
)
def test_work_of_a_step_grows_linearly_with_its_tokens(task: Any, sizes: Any) -> None:
    """All samples are alike here, so that a batch twice as large is twice as many tokens."""
    mix = step_sizes.texts(20, spread=0)

    def operations(batch: int) -> int:
        size = replace(sizes["test"], batch=batch, query=mix, positive=mix, token_budget=200)
        one = task(size, CPU)
        one.ours()
        return cost_of(one.ours, device=CPU).flops

    assert operations(16) == pytest.approx(2 * operations(8), rel=0.1)


def test_adapters_of_both_sides_have_gradients_that_are_compared() -> None:
    """`assert_same_step` compares what it finds: it must find every adapter."""
    task = contrast.Contrast(step_sizes.CONTRAST["test"], CPU)
    task.peer()
    layers, blocks = 2, 2
    assert len(training.gradients(task.theirs.model)) == 3 * (7 * layers + 3 * blocks)


@pytest.mark.parametrize("broken", ["loss", "gradients"])
def test_a_step_that_differs_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = rebuilding.Bridge(step_sizes.BRIDGE["test"], CPU)
    ours = task.ours

    def wrong() -> Any:
        loss = ours()
        if broken == "loss":
            return loss * 1.001
        for gradient in training.gradients(task.module).values():
            gradient.mul_(1.001)
        return loss

    monkeypatch.setattr(task, "ours", wrong)
    with pytest.raises(AssertionError, match="differs by"):
        task.check()


def test_scores_of_the_bridge_are_hardly_more_than_are_needed() -> None:
    counts = counted("attention_bridge")
    assert counts["scores_over_needed"].ours < 2 < counts["scores_over_needed"].peer


def test_needed_scores_are_those_of_the_dense_mask() -> None:
    task = attention_bridge.BridgedAttention(attention_bridge.TEST, CPU)
    mask = dense_mask(policy("eos_bridge"), task.segment_lengths)
    assert int(mask.sum()) == task.plan().num_scores


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark", [b for b in BENCHMARKS if CUDA_IN_FLOAT32 in b.sizes], ids=lambda b: b.name
)
def test_the_types_of_a_gpu_agree_too(benchmark: Benchmark) -> None:
    """What --device cuda runs, but for the device and the kernel that `auto` finds there."""
    size = benchmark.sizes["test"]
    if hasattr(size, "model"):
        tuning = benchmark.sizes["cuda"].model.tuning
        size = replace(size, model=replace(size.model, dtype=torch.bfloat16, tuning=tuning))
    else:
        size = replace(size, dtype=torch.bfloat16)
    task = benchmark.build(size, CPU)
    task.check()
    for side in (task.ours, task.peer):  # with dropout
        side()


def test_scoring_has_hits_and_misses_and_candidates_of_its_own() -> None:
    own = scoring.Scoring(scoring.TEST, CPU)
    assert len({tuple(sorted(row)) for row in own.index}) > 1
    shared = scoring.Scoring(scoring.SHARED.sizes["test"], CPU)
    assert len({tuple(sorted(row)) for row in shared.index}) == 1
    assert 0.1 < sum(own.ours()) / own.samples < 0.9


# --- Comparison --------------------------------------------------------------------------------


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    class Wrong(masked_head.MaskedHead):
        def ours(self) -> Any:
            runs.append("ours")
            loss, gradient = super().ours()
            return loss, gradient * 1.01

    record = record_of(replace(masked_head.BENCHMARK, build=Wrong))
    assert record["error"].startswith("AssertionError: result 1 differs by 0.01 of its norm")
    assert runs == ["ours"]
    # What bfloat16 hides is noticed in float32.
    sizes = {"cuda": replace(masked_head.TEST, dtype=torch.bfloat16)}
    hidden = replace(masked_head.BENCHMARK, build=Wrong, sizes=sizes, curves=())
    assert "error" not in record_of(hidden, size="cuda")
    seen = replace(hidden, sizes=sizes | {CUDA_IN_FLOAT32: masked_head.TEST})
    assert record_of(seen, size="cuda")["error"] == record["error"]


def test_a_result_that_is_not_finite_is_refused() -> None:
    nan = torch.full((2,), torch.nan)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close([nan], [nan])


# --- JSON --------------------------------------------------------------------------------------


def record_of(benchmark: Benchmark, size: str = "test") -> dict[str, Any]:
    return measure(
        benchmark,
        size=size,
        device=CPU,
        effort=Effort(seconds=0, min_pairs=1, curve_pairs=1),
        ceiling=matrix_product_ceiling(CPU, side=64),
        environment=environment(CPU),
    )


@pytest.mark.parametrize(
    "benchmark",
    [
        pytest.param(one, id=one.name, marks=[pytest.mark.slow] * one.name.endswith(WITH_A_MODEL))
        for one in BENCHMARKS
    ],
)
def test_a_record_has_the_public_keys(benchmark: Benchmark) -> None:
    record = json.loads(json.dumps(record_of(benchmark), allow_nan=False))
    assert record["name"] == benchmark.name
    assert record["unit"] == "seconds"
    assert record["ratio"] == pytest.approx(record["peer"] / record["ours"])  # of one pair
    assert record["counts"].keys() == counted(benchmark.name).keys()
    assert all(count.keys() == {"ours", "peer", "ratio"} for count in record["counts"].values())
    assert RE_CREATION in record["peer_label"]
    assert {"device", "torch", "commit", "date", "threads"} <= record["environment"].keys()
    assert len(record["curves"]) == len(benchmark.curves)
    assert all(len(curve["points"]) >= 2 for curve in record["curves"])


# --- Command line ------------------------------------------------------------------------------

QUICK = ["--size", "test", "--pairs", "1", "--seconds", "0", "--no-curves"]


def test_one_name_writes_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deeper" / "one.json"
    run(["similarities", "--json", str(file), *QUICK])
    written = json.loads(file.read_text())
    assert written["name"] == "similarities"
    assert {"name", "ours", "peer", "ratio", "unit", "counts"} <= written.keys()
    assert written["curves"] == []
    line = capsys.readouterr().out.splitlines()[-1]
    assert all(part in line for part in ("similarities", "queries/s", "% of ceiling", "kB"))


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory.\nAsk less"), KeyboardInterrupt]
)
def test_an_error_ends_one_benchmark_and_loses_no_other(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two: the first fails, or the second is interrupted."""
    file, attention = tmp_path / "several.json", vision_attention.vision_attention

    def failing(*states: Any, fold_batch: bool, **rest: Any) -> Any:
        if fold_batch == isinstance(error, RuntimeError):  # of the first alone
            raise error
        return attention(*states, fold_batch=fold_batch, **rest)

    monkeypatch.setattr(vision_attention, "vision_attention", failing)
    monkeypatch.setattr(command, "matrix_product_ceiling", partial(matrix_product_ceiling, side=64))
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        run(["B3", "--json", str(file), *QUICK])
    written = json.loads(file.read_text())
    assert written["seconds"] > 0
    found = {record["name"]: record for record in written["results"]}
    if error is KeyboardInterrupt:
        assert found.keys() == {"vision_attention"}
        return
    assert caught.value.code == 1
    failed, other = found["vision_attention"], found["vision_attention_4d"]
    assert failed["error"] == "peer: RuntimeError: CUDA out of memory."
    assert failed["ratio"] is failed["ours"] is failed["peer"] is None
    assert failed["counts"] == {}
    assert other["ratio"] > 0
    run(["page", str(file), "--out", str(tmp_path / "results.md")])
    page = (tmp_path / "results.md").read_text()
    assert "**failed**" in page
    assert failed["error"] in page


def test_a_gpu_that_is_as_good_as_full_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 9 * GIB)
    assert_fits(Count(peer=50 * GIB, ours=62 * GIB), torch.device("cuda"))
    with pytest.raises(AssertionError, match=r"takes 75\.0 of 80\.0 GiB, more than 90%"):
        assert_fits(Count(peer=66 * GIB, ours=1), torch.device("cuda"))


def test_all_means_all() -> None:
    assert find("all") == list(BENCHMARKS)
    assert len({b.name for b in BENCHMARKS}) == len(BENCHMARKS)
    assert set(GATES) == {b.name for b in BENCHMARKS}
    assert all(find(name) for name in names())
    assert find("contrast_step_1024")[0] not in BENCHMARKS  # minutes for each pair


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], [], ["dora", "--pairs", "0"], ["dora", "--size", "huge"], ["page", "gone.json"]],
    ids=["name", "nothing", "pairs", "size", "file"],
)
def test_a_mistake_is_one_sentence_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_invented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["dora", "--device", "cuda"])
    assert caught.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@EVERY
def test_a_gpu_gives_the_same_records(benchmark: Benchmark) -> None:
    device = torch.device("cuda")
    record = measure(
        benchmark,
        size="test",
        device=device,
        effort=Effort(seconds=0, min_pairs=2, curve_pairs=1),
        ceiling=matrix_product_ceiling(device, side=512),
        environment=environment(device),
    )
    assert "error" not in record
    assert record["ours"] > 0
    assert record["environment"]["device_type"] == "cuda"


# --- Rules -------------------------------------------------------------------------------------


def test_peers_know_nothing_of_this_project() -> None:
    files = sorted((ROOT / "benchmarks" / "peers").glob("*.py"))
    assert len(files) > 4
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("cocoa_pl"), file
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("cocoa_pl") for alias in node.names), file


# --- Times -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark", [b for b in BENCHMARKS if b.target is not None], ids=lambda b: b.name
)
def test_no_ratio_is_under_half_of_its_target(benchmark: Benchmark) -> None:
    """Or of what the part that nobody gets around leaves possible on this machine."""
    record = measure(
        replace(benchmark, curves=()),
        size="cpu",
        device=CPU,
        effort=EFFORT,
        ceiling=matrix_product_ceiling(CPU),
        environment=environment(CPU),
    )
    assert benchmark.target is not None
    possible = record.get("ratio_at_floor", benchmark.target)
    assert record["ratio"] >= min(benchmark.target, possible) / 2
