"""Figures of a report: a map of vectors whose places are known, curves, and grids of policies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.figures import Mapped, flattened, read_panels, sample
from cocoa_pl.evaluation.report import Provenance
from cocoa_pl.evaluation.results import Results


def test_the_map_is_the_plane_in_which_points_lie_farthest_apart() -> None:
    """Of points of a plane in 50 dimensions it is that plane, stretched by axis, and never mirrored
    by the order of the rows.
    """

    def mapped(vectors: np.ndarray) -> list[Mapped]:
        items = Item("q"), Item("p")
        return [Mapped("s", "row", *items, pair) for pair in vectors.reshape(-1, 2, 50)]

    random = np.random.default_rng(0)
    flat = random.normal(size=(12, 2)) * [3, 1]
    vectors = flat @ np.linalg.qr(random.normal(size=(50, 2)))[0].T + 7
    space = flattened(mapped(vectors))
    assert space is not None
    assert sum(space.shares) == pytest.approx(1)
    points = np.concatenate([place.at for place in space.places])
    assert points.min(axis=0) == pytest.approx([0, 0])
    assert points.max(axis=0) == pytest.approx([1, 1])
    for axis in (0, 1):  # each axis is an affine function of the plane's points
        design = np.column_stack([flat, np.ones(len(flat))])
        residual = np.linalg.lstsq(design, points[:, axis], rcond=None)[1]
        assert residual == pytest.approx(0, abs=1e-12)
    turned = flattened(mapped(vectors[::-1]))
    assert turned is not None
    np.testing.assert_allclose(points[::-1], [at for one in turned.places for at in one.at])
    line = np.outer(np.arange(6), np.ones(50))
    assert flattened(mapped(line)) is None


def test_rows_are_spread_over_every_subset(
    make_subset: Callable[..., EvalSubset],
    compass: Callable[..., np.ndarray],
    evaluate: Callable[..., Results],
) -> None:
    rows = [(f"q {n}", [f"p {n + 1}", "other 90"]) for n in range(20)]
    subsets = [make_subset(name, rows) for name in ("a", "b")]
    queries, candidates = compass(subsets[0].queries), compass(subsets[0].candidates)
    found = sample(subsets[0], queries, candidates, rows=3)
    assert [one.row_id for one in found] == ["a row 0", "a row 10", "a row 19"]
    for one in found:
        np.testing.assert_array_equal(one.at, compass([one.query, one.positive]))
    assert len(sample(subsets[0], queries, candidates, rows=0)) == 1
    space = evaluate(subsets).space
    assert space is not None
    assert [place.subset for place in space.places] == ["a"] * 20 + ["b"] * 20


def test_panels_gather_losses_by_stage_and_skip_what_is_not_finite(metrics_csv: Path) -> None:
    mntp, contrast = read_panels({"": metrics_csv})
    assert (mntp.stage, mntp.name, mntp.left_out) == ("warmup", "loss_mntp", 1)
    assert mntp.curves == {"train": [[0, 2.5], [2, 1.5]], "val": [[2, 1.75]]}
    assert mntp[3:7] == (0, 2, 0, 2.5)  # steps, and values from zero
    assert contrast.low == -0.5
    (_, alone) = read_panels({"a": metrics_csv}, only="train")
    assert list(alone.curves) == ["a train"]


def test_long_curves_are_thinned_to_means_and_other_columns_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    lines = [f"s,{step},train/loss,{step % 2}" for step in range(1000)]
    file.write_text("stage,step,name,value\n" + "\n".join(lines))
    (panel,) = read_panels({"": file})
    assert len(panel.curves["train"]) == 200
    assert panel.curves["train"][:2] == [[4, 0.4], [9, 0.6]]
    for text in ("step,loss\n1,2\n", "stage,step,name,value\ns,0,loss,much\n", ""):
        file.write_text(text)
        with pytest.raises(UserError, match="expected the columns stage,step,name,value"):
            read_panels({"": file})


def test_grids_show_each_policy_once_and_who_uses_it(policies: dict[str, Policy]) -> None:
    names = {"a": "bidirectional", "b": "eos_bridge", "c": "bidirectional", "d": "causal"}
    used = {user: policies[name] for user, name in names.items()}
    assert Provenance(policies=used).grids == {
        "bidirectional: a, c": ("AAAAEBBB",) * 8,
        "eos_bridge: b": (*("AAAAE   ",) * 4, "AAAAEBBB", *("    EBBB",) * 3),
        "causal: d": tuple("AAAAEBBB"[: n + 1].ljust(8) for n in range(8)),
    }
