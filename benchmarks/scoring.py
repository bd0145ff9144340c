"""B8. Precision@1 from embeddings: products of whole blocks, against one query at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.benchmark import SECONDS, Benchmark, Task, curve
from benchmarks.counting import Count, Counts
from benchmarks.peers.scoring import Key, hits_row_by_row
from benchmarks.timing import Run
from cocoa_pl.evaluation.scoring import rank_positives


@dataclass(frozen=True)
class Size:
    """One subset of a benchmark.

    Attributes:
        pool: candidates that are encoded.
        candidates: of each row; all rows have the same ones where `shared`.
    """

    rows: int
    pool: int
    candidates: int
    width: int
    shared: bool


class Scoring(Task):
    """From embeddings to hits; who is a candidate of which row is known before."""

    def __init__(self, size: Size, device: torch.device) -> None:
        rng = np.random.default_rng(0)
        self.size, self.samples = size, size.rows
        self.device = torch.device("cpu")  # on any machine
        self.candidates = unit(rng.normal(size=(size.pool, size.width)))
        if size.shared:
            # The positive comes first in MMEB's rows, so the others are in one order behind it.
            everyone = rng.permutation(size.pool)[: size.candidates]
            positives = rng.integers(size.candidates, size=size.rows)
            self.index = [
                np.concatenate([everyone[p : p + 1], np.delete(everyone, p)]) for p in positives
            ]
        else:
            self.index = [rng.permutation(size.pool)[: size.candidates] for _ in range(size.rows)]
        first = np.array([row[0] for row in self.index])
        noise = rng.normal(size=(size.rows, size.width))
        self.queries = unit(
            self.candidates[first] + 0.4 * unit(noise) * rng.uniform(0, 30, (size.rows, 1))
        )
        self.query_index = np.arange(size.rows)
        # The peer finds an embedding by the text and the image that it was made of.
        self.query_keys = [_key("query", row) for row in range(size.rows)]
        self.rows = [[_key("candidate", one) for one in row] for row in self.index]
        self.known_queries = dict(zip(self.query_keys, self.queries, strict=True))
        self.known_candidates = {
            _key("candidate", place): one for place, one in enumerate(self.candidates)
        }

    def peer(self) -> Sequence[bool]:
        return hits_row_by_row(
            self.query_keys, self.rows, self.known_queries, self.known_candidates
        )

    def ours(self) -> Sequence[bool]:
        ranks = rank_positives(
            self.queries,
            self.candidates,
            query_index=self.query_index,
            candidate_index=self.index,
        )
        return (ranks.official == 1).tolist()

    def check(self) -> None:
        found = self.ours()
        assert found == self.peer()
        assert 0 < sum(found) < len(found), "every row hit or missed: nothing was compared"

    def floor(self) -> Run | None:
        """Where all rows have the same candidates: one product."""
        if not self.size.shared:
            return None
        return lambda: self.queries @ self.candidates.T

    def counts(self) -> Counts:
        needed = self.size.rows * self.size.candidates
        copied = 4 * needed * self.size.width  # np.stack of every row's candidates
        return {
            "scores_needed": Count(needed, needed),
            "bytes_of_copied_embeddings": Count(copied, 0),
        }


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """(N, D), each row of length 1."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _key(kind: str, place: int) -> Key:
    return f"a text of {kind} {place} as long as a caption is", f"images/{kind}/{place}.jpg"


TEST = Size(rows=60, pool=50, candidates=20, width=16, shared=False)
CPU = Size(rows=64, pool=4000, candidates=1000, width=1536, shared=False)

PEER = (
    "VLM2Vec's and CoCoA's eval.py: a dictionary look-up for each candidate, np.stack, norms, "
    "one product, argmax"
)

SIZES = {"test": TEST, "cpu": CPU, "cuda": CPU}  # on the processor of any machine

BENCHMARK = Benchmark(
    id="B8",
    name="scoring",
    title="Scoring, each row with candidates of its own",
    peer_label=PEER,
    noun="queries",
    # Missed on a slow core: two thirds of our time are the product, the rest picks each row's
    # candidates out of it; the peer's time is mostly memory.
    target=13,
    note="1,000 candidates of a pool of 4,000, embeddings of 1,536. On the processor.",
    sizes=SIZES,
    build=Scoring,
    curves=(
        curve(
            "candidates in the pool",
            SECONDS,
            "pool",
            {"test": (25, 50), "cpu": (1000, 2000, 4000, 8000), "cuda": (1000, 2000, 4000, 8000)},
            SIZES,
        ),
    ),
)

SHARED_CPU = replace(CPU, rows=128, pool=1000, shared=True)
SHARED_SIZES = {
    "test": replace(TEST, pool=20, shared=True),
    "cpu": SHARED_CPU,
    "cuda": SHARED_CPU,
}

SHARED = replace(
    BENCHMARK,
    name="scoring_shared",
    title="Scoring, all rows with the same candidates",
    target=100,  # needs a core with twice the FLOP/s: nine tenths of our time are the product
    note="1,000 candidates for all rows, as in classification. On the processor.",
    sizes=SHARED_SIZES,
    curves=(
        curve(
            "queries",
            SECONDS,
            "rows",
            {"test": (30, 60), "cpu": (16, 32, 64, 128), "cuda": (16, 32, 64, 128)},
            SHARED_SIZES,
        ),
    ),
)
