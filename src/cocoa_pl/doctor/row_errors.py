"""Row errors of the training readers, as findings.

The rules for rows live in the readers alone. With `on_bad_row=skip` they log each error in a
record's `bad` (and left-out repetitions in `repeated`); a handler collects and sorts them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from cocoa_pl.data import rows
from cocoa_pl.doctor.findings import Finding, Findings

# The first pattern that is found in a message decides; `file` is the image it is about. A message
# that none knows is still counted, as a `bad_row`, which has the same severity.
_PATTERNS = (
    ("duplicate_pair", re.compile(r"same query and positive as ")),
    ("elongated_image", re.compile(r"image (?P<file>.+) is \d+ x \d+ pixels; the longer side")),
    ("corrupt_image", re.compile(r"image (?P<file>.+?) cannot be read as an image")),
    ("corrupt_image", re.compile(r"image (?P<file>.+?) has signed or 32-bit pixels")),
    ("path_outside_root", re.compile(r"image path '(?P<file>.+?)' (?:is absolute|leaves the)")),
    ("missing_image", re.compile(r"image path '(?P<file>.+?)' is not a path")),
    ("missing_image", re.compile(r"image (?P<file>.+) does not exist")),
    ("placeholder_mismatch", re.compile(r"<\|image_\d+\|>|<image>|holds U\+FDD0")),
    ("empty_text", re.compile(r"is empty: it has neither text nor")),
)
_ROW = re.compile(r"^(?P<row>.*? (?:row|line) \d+)(?:, (?P<role>\w+))?: (?:as (?P<first>.+?): )?")
_ROLE = re.compile(r"\bthe (query|positive|negative|candidate)\b")


class RowErrorHandler(logging.Handler):
    """Keeps the readers' row errors as findings of one part of the data."""

    def __init__(self, findings: Findings, *, part: str) -> None:
        super().__init__(level=logging.INFO)
        self.findings = findings
        self.part = part

    def emit(self, record: logging.LogRecord) -> None:
        for message in record.__dict__.get("bad", ()):
            self.findings.add(as_finding(message, part=self.part))
        for message in record.__dict__.get("repeated", ()):
            row_id, _, first = message.partition(" as ")
            text = f"{row_id}: same query and positive as {first}; left out"
            self.findings.add(Finding("repeated_row", self.part, row_id, "", "", text))


@contextmanager
def collect_row_errors(findings: Findings, *, part: str) -> Iterator[None]:
    """Within this, row errors of the readers become findings instead of lines in the log."""
    logger = logging.getLogger(rows.__name__)
    handler, level, propagate = (
        RowErrorHandler(findings, part=part),
        logger.level,
        logger.propagate,
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def as_finding(message: str, *, part: str) -> Finding:
    """A reader's message, taken apart into kind, row, role and file."""
    kind, file = kind_of(message)
    place = _ROW.match(message)
    row_id = place["row"] if place else ""
    role = _ROLE.search(message[place.end() :] if place else message)
    named = place["role"] if place else None
    return Finding(kind, part, row_id, named or (role[1] if role else ""), file, message)


def kind_of(message: str) -> tuple[str, str]:
    """The kind of a reader's message, and the image file that it is about, if any."""
    for kind, pattern in _PATTERNS:
        if found := pattern.search(message):
            return kind, found.groupdict().get("file") or ""
    return "bad_row", ""
