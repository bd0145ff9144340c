"""What the training readers say about rows in, findings out.

The rules for rows live in the readers alone. Told to skip bad rows, they log each complaint in a
record's `complaints` (and left-out repetitions in `repeated`); here they are heard and sorted.
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


class Listener(logging.Handler):
    """Hears complaints of the readers and keeps them as findings of one part of the data."""

    def __init__(self, findings: Findings, *, part: str) -> None:
        super().__init__(level=logging.INFO)
        self.findings = findings
        self.part = part

    def emit(self, record: logging.LogRecord) -> None:
        for message in record.__dict__.get("complaints", ()):
            self.findings.add(as_finding(message, part=self.part))
        for message in record.__dict__.get("repeated", ()):
            row_id, _, first = message.partition(" as ")
            said = f"{row_id}: same query and positive as {first}; left out"
            self.findings.add(Finding("repeated_row", self.part, row_id, "", "", said))


@contextmanager
def heard(findings: Findings, *, part: str) -> Iterator[None]:
    """Inside, what readers complain about becomes findings instead of lines in the log."""
    logger = logging.getLogger(rows.__name__)
    listener, level, propagate = Listener(findings, part=part), logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate


def as_finding(message: str, *, part: str) -> Finding:
    """A reader's complaint with its kind, row, role and file told apart."""
    kind, file = kind_of(message)
    place = _ROW.match(message)
    row_id = place["row"] if place else ""
    role = _ROLE.search(message[place.end() :] if place else message)
    named = place["role"] if place else None
    return Finding(kind, part, row_id, named or (role[1] if role else ""), file, message)


def kind_of(message: str) -> tuple[str, str]:
    """The kind of a complaint and the image file it is about, if any."""
    for kind, pattern in _PATTERNS:
        if found := pattern.search(message):
            return kind, found.groupdict().get("file") or ""
    return "bad_row", ""
