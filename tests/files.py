"""Files that tests write and read."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Metrics = dict[tuple[str, int, str], float]  # stage, step, name


def noise(size: tuple[int, int], *, seed: int = 0) -> Image.Image:
    """No two pixels alike, so nothing can be swapped unseen, and no other seed gives it.

    Args:
        size: width and height.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def write_noise(path: Path, size: tuple[int, int] = (28, 28), *, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(size, seed=seed).save(path)
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """As the suffix says: a line of JSON each, one array, or parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_metrics(file: Path) -> Metrics:
    """A metrics.csv without the rates, which no two runs share."""
    with file.open(newline="") as opened:
        rows = [r for r in csv.DictReader(opened) if "per_second" not in r["name"]]
    found = {(r["stage"], int(r["step"]), r["name"]): float(r["value"]) for r in rows}
    assert len(found) == len(rows)  # nothing is logged twice
    return found


def series(run_dir: Path, name: str) -> dict[int, float]:
    """A metric of a run of one stage by its step."""
    found = read_metrics(run_dir / "metrics.csv")
    return {step: value for (_, step, metric), value in found.items() if metric == name}
