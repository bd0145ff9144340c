"""The commands that stand on the pages, and which of them can be run here."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("tutorial", "use", "mining", "stages", "extend", "data", "doctor", "plan", "speed")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
COMMAND = r"(?:PYTHONPATH=\S+ )?(?:python (?:train|evaluate)\.py|cocoa \w+)\b[^\n`]*"
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

# What a command needs that is not here, by a part of it.
NEEDS = {
    "hours": r"experiment=ablation",
    "the hub": r"data=mmeb_(stream|hub)",
    "a GPU": r"kernel=|--device cuda",
    "several processes": r"torchrun|trainer=(ddp|fsdp)|\bsbatch|store=",
    "values of the reader's own": r"\.\.\.|=RUN\b|\bcocoa \w+ RUN\b|\bFOLDER\b|KEY=VALUE",
    "a browser (tests/search)": r"--serve",
}


def missing(command: str) -> str:
    if command.startswith("cocoa plan"):  # reads no weights and no rows
        return ""
    return next((need for need, part in NEEDS.items() if re.search(part, command)), "")


def commands() -> list[str]:
    """In the order of the pages; a backslash continues a line."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found += re.findall(rf"^(?:    )?({COMMAND})$", text, re.MULTILINE)
    cut = (re.split(r"\s{2,}#", command)[0].strip() for command in found)
    return list(dict.fromkeys(" ".join(command.split()) for command in cut))


HERE = [command for command in commands() if not missing(command)]


def troubles() -> list[tuple[str, list[str]]]:
    """Kind, if it has one, and messages of each entry of the troubleshooting page."""
    lines = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    found = []
    for line in lines:
        cells = re.split(r"(?<!\\)\|", line)[1:-1]  # a bar in a cell has a backslash
        first = re.findall(r"`([^`]+)`", cells[0].replace("\\|", "|")) if cells else []
        if len(cells) == 4 and first:
            found.append((first[0], re.findall(r"`([^`]+)`", cells[1].replace("\\|", "|"))))
        elif first and re.fullmatch(r"(?: ?`[^`]+`,?)+ ", cells[0]):
            found.append(("", first))
    return found


def pattern_of(message: str) -> re.Pattern[str]:
    """A quoted message as a pattern; `…` stands for what differs."""
    fixed = [part.strip() for part in message.split("…") if part.strip()]
    return re.compile(".*".join(map(re.escape, fixed)), re.DOTALL)
