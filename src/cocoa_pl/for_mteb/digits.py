"""The embedded digit scenes as tasks of mteb, without a download; an example of a task of one's
own.

    python evaluate.py ckpt=RUN benchmark=mteb \
        benchmark.tasks=[cocoa_pl.for_mteb.digits.DigitScenes]
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Image
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

from cocoa_pl.data.digit_scenes import DIGIT_WORDS
from cocoa_pl.data.digits import DigitsBenchmark
from cocoa_pl.data.items import EvalSubset

CACHE_DIR = ".cache"
ASKED = "Find the image of"
LABELS = list(DIGIT_WORDS)

_SHARED: dict[str, Any] = {
    "reference": "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    "dataset": {"path": "cocoa_pl/digits", "revision": "1"},  # drawn here, never asked for
    "eval_langs": ["eng-Latn"],
    "modalities": ["image", "text"],
}


class DigitScenes(AbsTaskRetrieval):
    """Find the picture of a caption among 300."""

    metadata = TaskMetadata(
        name="DigitScenes",
        description="Find the picture in which handwritten digits stand as the caption says.",
        type="Any2AnyRetrieval",
        category="t2i",
        main_score="ndcg_at_10",
        **{**_SHARED, "prompt": {"query": ASKED, "document": "Represent the image"}},
    )

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Draw the scenes, or find them drawn."""
        if self.data_loaded:
            return
        subset = _subset("scene_t2i")
        queries = [item.text.removeprefix(f"{ASKED} ") for item in subset.queries]
        relevant: dict[str, dict[str, int]] = {f"q{number}": {} for number in range(len(queries))}
        for query, candidates in zip(subset.query_index, subset.candidate_index, strict=True):
            relevant[f"q{query}"][f"d{candidates[0]}"] = 1
        pictures = [str(item.media[0]) for item in subset.candidates]
        corpus = {"id": [f"d{number}" for number in range(len(pictures))], "image": pictures}
        split: Any = {
            "queries": Dataset.from_dict({"id": list(relevant), "text": queries}),
            "corpus": Dataset.from_dict(corpus).cast_column("image", Image()),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class DigitCount(AbsTaskZeroShotClassification):
    """Say how many digits a picture holds, by the nearest word."""

    metadata = TaskMetadata(
        name="DigitCount",
        description="How many handwritten digits are there?",
        type="ZeroShotClassification",
        category="i2t",
        main_score="accuracy",
        prompt="How many digits are there?",
        **_SHARED,
    )

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Draw the scenes, or find them drawn."""
        if self.data_loaded:
            return
        subset = _subset("count_vqa")
        answers = [
            LABELS.index(subset.candidates[candidates[0]].text)
            for candidates in subset.candidate_index
        ]
        pictures = [str(subset.queries[query].media[0]) for query in subset.query_index]
        rows = Dataset.from_dict({"image": pictures, "label": answers})
        self.dataset = {"test": rows.cast_column("image", Image())}
        self.data_loaded = True

    def get_candidate_labels(self) -> list[str]:
        """The words of the numbers."""
        return LABELS


def _subset(name: str) -> EvalSubset:
    benchmark = DigitsBenchmark(
        name="digits", cache_dir=CACHE_DIR, seed=0, scenes=300, task_rows=300
    )
    return next(subset for subset in benchmark.subsets() if subset.name == name)
