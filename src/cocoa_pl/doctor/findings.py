"""What can be wrong with data: kinds with a severity, single findings, and all findings of a check.

The rules for rows live in the readers alone; their errors become findings.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from enum import Enum

from cocoa_pl.errors import UserError

KEPT = 1000  # findings of a kind that are kept in full; the rest is counted


class Severity(Enum):
    """What a finding does to a run with `on_bad_row=fail`."""

    STOPS = "stops training"
    LOSES = "loses rows or text"
    INFORMS = "information"


@dataclass(frozen=True)
class Kind:
    """A fault: how bad it is, what it is called, and what to do about it."""

    severity: Severity
    title: str
    advice: str


_STOPS, _LOSES, _INFORMS = Severity

# The order is the report's.
KINDS = {
    "unreadable_source": Kind(
        _STOPS, "files or folders that cannot be read", "see the message; nothing behind it is read"
    ),
    "too_few_rows": Kind(
        _STOPS, "stage without enough rows", "give it more rows, or another batch_size"
    ),
    "missing_image": Kind(_STOPS, "image missing", "unpack all image archives; check image_root"),
    "unreadable_file": Kind(
        _STOPS, "file that cannot be reached", "its owner and mode, or a link: see the message"
    ),
    "path_outside_root": Kind(
        _STOPS, "image path leaves the root", "write paths relative to image_root"
    ),
    "corrupt_image": Kind(_STOPS, "image corrupt or cut off", "fetch the file again"),
    "elongated_image": Kind(_STOPS, "image too elongated", "crop it or drop the row"),
    "placeholder_mismatch": Kind(
        _STOPS,
        "placeholder and image do not match",
        "<|image_1|> or <image> where the image belongs",
    ),
    "empty_text": Kind(_STOPS, "neither text nor image", "fill the side or drop the row"),
    "duplicate_pair": Kind(_STOPS, "same pair twice", "remove one"),
    "bad_row": Kind(_STOPS, "row of the wrong form", "see the message"),
    "images_exceed_length": Kind(
        _STOPS, "images alone exceed max_length", "lower max_pixels or raise max_length"
    ),
    "repeated_row": Kind(_LOSES, "row repeats another, left out", "nothing, or remove it"),
    "truncated_text": Kind(_LOSES, "text cut to max_length", "raise max_length or shorten texts"),
    "negative_is_positive": Kind(
        _LOSES, "negative equal to the positive", "mine negatives again without the answers"
    ),
    "overlap_pair": Kind(
        _INFORMS, "pair is in the evaluation, too", "drop it: scores would be too high"
    ),
    "overlap_query": Kind(
        _INFORMS, "query is in the evaluation, too", "drop it: scores would be too high"
    ),
    "overlap_image": Kind(
        _INFORMS, "image is in the evaluation, too", "drop it if pictures should be unseen"
    ),
    "several_positives": Kind(
        _INFORMS,
        "query with several positives",
        "in one batch they are false negatives of each other",
    ),
    "tiny_image": Kind(_INFORMS, "image of a few pixels", "often a placeholder; look at it"),
    "image_tag": Kind(
        _INFORMS,
        "text holds the placeholder of an image",
        "it is read as words; is the image missing?",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault in one place.

    Attributes:
        kind: a name in `KINDS`.
        part: `train`, `validation`, a benchmark's name, or a stage's.
        row_id: as in messages of the readers; empty where no single row is meant.
        role: `query`, `positive`, `negative` or `candidate`; empty where it is the whole row.
        file: the image; empty where it is not about one.
    """

    kind: str
    part: str
    row_id: str
    role: str
    file: str
    message: str

    @classmethod
    def of(cls, error: UserError, *, part: str) -> Finding:
        return cls(error.kind, part, error.row_id, error.role, error.file, str(error))


class Findings:
    """All findings of a check, counted by kind; the first `KEPT` of each are kept, in the order of
    the data: millions of rows may share one fault.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kept: dict[str, list[Finding]] = defaultdict(list)

    def add(self, finding: Finding) -> None:
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] <= KEPT:
            self.kept[finding.kind].append(finding)

    def kinds(self) -> list[str]:
        """The kinds that were found, in the report's order."""
        return [kind for kind in KINDS if self.counts[kind]]

    def total(self, severity: Severity) -> int:
        """How many findings of this severity there are."""
        return sum(self.counts[kind] for kind in KINDS if KINDS[kind].severity is severity)

    @property
    def stops_training(self) -> bool:
        """Whether a run with `on_bad_row=fail` would stop."""
        return self.total(Severity.STOPS) > 0
