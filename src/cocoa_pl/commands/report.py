"""`cocoa report`: scored runs in, a page that sets them side by side out."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa_pl.evaluation.comparison import Row, Scored, compared, read_runs, write_comparison


def run(arguments: Sequence[str], console: Console) -> int:
    """Write the page and show its means; the exit status is 0.

    Raises:
        UserError: for runs that do not compare.
    """
    parsed = _parser().parse_args(arguments)
    runs = read_runs([Path(folder) for folder in parsed.runs])
    out = Path(parsed.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = compared(runs)
    write_comparison(out, runs, rows, date=datetime.date.today().isoformat())
    console.print(_table(runs, rows))
    console.print(f"report: {out}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cocoa report",
        description="Compare runs that were scored on one benchmark: scores with intervals of "
        "their differences from the first run, loss curves, and what their configurations do not "
        "share. A single run's own page is its report.html.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with results.json")
    parser.add_argument("--out", default="comparison.html", help="default: comparison.html")
    return parser


def _table(runs: Sequence[Scored], rows: Sequence[Row]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("precision@1 in %")
    for one in runs:
        table.add_column(escape(one.name), justify="right")
    for row in rows:
        if row.kind != "subset":
            cells = [
                "-" if cell.score is None else f"{100 * cell.score:.1f}{_SIGN[cell.differs]}"
                for cell in row.cells
            ]
            table.add_row(escape(row.name.replace("_", " ")), *cells)
    return table


_SIGN = {"": " ", "above": "+", "below": "-"}
