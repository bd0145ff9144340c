"""The commands that stand on the pages, and which of them can be run here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

WHOLE_LINE = re.compile(
    r"^(?:    )?((?:PYTHONPATH=\S+ )?(?:python (?:train|evaluate)\.py|cocoa \w+)\b[^\n`]*)$",
    re.MULTILINE,
)
# Also within a line, behind a launcher, and in comments and help texts.
WITH_VALUES = re.compile(
    r"(?:(?:python |per-node[ =]\d |29500 +)(train|evaluate)\.py|\bcocoa (doctor|plan|mine))"
    r" ([^\n`]*=[^\n`]*)"
)

# What a command needs that is not here, by a part of it.
NEEDS = {
    "hours": r"experiment=ablation",
    "the hub": r"data=mmeb_(stream|hub)",
    "a GPU": r"kernel=|--device cuda",
    "several processes": r"torchrun|trainer=(ddp|fsdp)|\bsbatch|store=",
    "values of the reader's own": r"\.\.\.|=RUN\b|\bcocoa \w+ RUN\b|\bFOLDER\b|KEY=VALUE",
    "a browser (tests/search)": r"--serve",
}


def can_run(command: str) -> bool:
    """Whether all is here that it needs; a plan reads no weights and no rows."""
    needs = any(re.search(part, command) for part in NEEDS.values())
    return command.startswith("cocoa plan") or not needs


def text_of(places: Iterable[Path]) -> str:
    """A backslash continues a line."""
    return re.sub(r"\\\n[# ]*", "", "\n".join(place.read_text() for place in places))


def commands() -> list[str]:
    """What fills a line of a page, in the order of the pages."""
    found = (re.split(r"\s{2,}#", line)[0] for line in WHOLE_LINE.findall(text_of(PAGES)))
    return list(dict.fromkeys(" ".join(command.split()) for command in found))


HERE = [command for command in commands() if can_run(command)]


def compositions(places: Iterable[Path]) -> list[tuple[str, ...]]:
    """The name of each command with values, and its overrides."""
    found = [
        overrides([script or tool, *shlex.split(re.split(r'  +[#(]|"', words)[0])])
        for script, tool, words in WITH_VALUES.findall(text_of(places))
    ]
    return [words for words in dict.fromkeys(found) if len(words) > 1]


def overrides(words: list[str]) -> tuple[str, ...]:
    """The name and what can be composed; nothing of Hydra's own options. In a header, what may be
    left out stands in brackets.
    """
    if {"--config-dir", "--cfg"} & {*words}:
        return ()
    plain = [w[1:-1] if w.startswith("[") and w.endswith("]") else w for w in words[1:]]
    kept = [w for w in plain if "=" in w or w == "-m"]
    return words[0], *(w for w in kept if not re.search(r"\.\.\.|{|key=value|KEY=VALUE", w))


def troubles() -> list[tuple[str, list[str]]]:
    """Kind, if it has one, and messages of each entry of the troubleshooting page."""
    found = []
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1]  # a bar in a cell has a backslash
        quoted = [re.findall(r"`([^`]+)`", cell.replace("\\|", "|")) for cell in cells[:2]]
        if len(cells) == 4 and quoted[0]:
            found.append((quoted[0][0], quoted[1]))
        elif cells and re.fullmatch(r"(?: ?`[^`]+`,?)+ ", cells[0]):
            found.append(("", quoted[0]))
    return found


def pattern_of(message: str) -> re.Pattern[str]:
    """A quoted message as a pattern; `…` stands for what differs."""
    fixed = [part.strip() for part in message.split("…") if part.strip()]
    return re.compile(".*".join(map(re.escape, fixed)), re.DOTALL)
