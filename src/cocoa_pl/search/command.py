"""`cocoa search`: the images of a folder that are nearest to a query, on the terminal or a page."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError, extra
from cocoa_pl.search.index import ImageIndex, existing
from cocoa_pl.search.page import LOCAL, page, printable

SHOWN = 5  # files that are left out and named


def run(arguments: Sequence[str], console: Console) -> int:
    """Bring the index up to date, then search it, or serve a page; the exit status is 0.

    Raises:
        UserError: for a folder without images, a model that is none, or a query that is none.
    """
    parsed = _parser().parse_args(arguments)
    if parsed.top < 1:
        raise UserError(f"--top is at least 1, not {parsed.top}")
    folder = existing(Path(parsed.folder))  # a wrong one is refused before a model is loaded
    embedder = Embedder.load(parsed.model, device=parsed.device)
    index = ImageIndex(
        folder,
        embedder,
        kept_in=Path(parsed.index) if parsed.index else None,
        threads=parsed.threads,
    )
    embedded, left_out = index.update()
    log = Console(stderr=True) if parsed.json else console
    log.print(f"{len(index.files):,} images, {embedded:,} of them new", soft_wrap=True)
    for file, why in list(left_out.items())[:SHOWN]:
        log.print(f"{printable(file)} {why}", soft_wrap=True, markup=False)
    if len(left_out) > SHOWN:
        log.print(f"... and {len(left_out) - SHOWN} more left out")
    if parsed.serve:
        _serve(index, parsed, console)
    elif parsed.text or parsed.image:
        query = {"text": parsed.text, "image": parsed.image}
        vector = embedder.encode([query], instruction=parsed.instruction)[0]
        table = Table("", "score", "image", box=None, header_style="bold")
        for rank, one in enumerate(index.search(vector, parsed.top), 1):
            name = printable(index.folder / one.file)
            table.add_row(str(rank), f"{one.score:.3f}", escape(name))
            if parsed.json:
                line = json.dumps({"file": name, "score": round(one.score, 6)})
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        if not parsed.json:
            console.print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cocoa search",
        description="Search the images below a folder by a text, an image, or both. Vectors are "
        "kept in FOLDER/.cocoa: what is new or has changed is embedded before each search.",
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("text", nargs="?", help="what to look for; without it and --image, index")
    parser.add_argument("--image", metavar="FILE", help="what to look for, or beside the text")
    parser.add_argument(
        "--model", required=True, help="a run, an exported folder or a hub id", metavar="MODEL"
    )
    parser.add_argument("--top", type=int, default=10, help="images that are shown (default: 10)")
    parser.add_argument("--instruction", help="before the query's words, as in training")
    parser.add_argument("--index", metavar="DIR", help="where vectors are kept instead")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--serve", action="store_true", help="a page in the browser instead")
    parser.add_argument("--host", default="127.0.0.1", help="of the page (default: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="of the page (default: 8000)")
    parser.add_argument("--threads", type=int, default=4, help="that read images (default: 4)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def _serve(index: ImageIndex, parsed: argparse.Namespace, console: Console) -> None:
    waitress = extra("waitress", of="search", wanted_by="the page")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a page's thumbnails are a queue
    hosts = LOCAL if parsed.host in LOCAL else ()
    app = page(index, instruction=parsed.instruction, top=parsed.top, hosts=hosts)
    try:
        server = waitress.create_server(app, host=parsed.host, port=parsed.port, threads=4)
    except OSError as error:
        raise UserError(f"--port {parsed.port}: {error.strerror or error}") from error
    console.print(f"http://{parsed.host}:{server.effective_port}  (Ctrl-C ends it)", soft_wrap=True)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
