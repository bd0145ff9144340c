"""`cocoa search`: the images of a folder that are nearest to a query, on the terminal or a page."""

from __future__ import annotations

import argparse
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cocoa_pl.data.item_batches import whole_number
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError, extra, visible
from cocoa_pl.search.index import ImageIndex, existing
from cocoa_pl.search.page import LOCAL, Keeper, page

TOP, TOP_OF_A_PAGE = 10, 24
REASONS = 10  # why files are left out, of which the first is named


def run(arguments: Sequence[str], console: Console) -> int:
    """Bring the index up to date, then search it, or serve a page; the exit status is 0.

    Raises:
        UserError: for a folder without images, a model that is none, or a query that is none.
    """
    parsed = _parser().parse_args(arguments)
    for name, least in (("top", 1), ("threads", 0)):
        if (number := getattr(parsed, name)) is not None:
            whole_number(f"--{name}", number, least=least)
    folder = existing(Path(parsed.folder))  # a wrong one is refused before a model is loaded
    embedder = Embedder.load(parsed.model, device=parsed.device)
    index = ImageIndex(
        folder,
        embedder,
        kept_in=Path(parsed.index) if parsed.index else None,
        threads=parsed.threads,
    )
    if parsed.serve:
        _serve(index, parsed, console)
    embedded = index.update()
    log = Console(stderr=True) if parsed.json else console
    log.out(f"{len(index.files):,} images, {embedded:,} of them new", highlight=False)
    _tell_left_out(index, log)
    if not index.files:
        raise UserError(f"{index.folder} holds no image that can be read")
    if parsed.text or parsed.image:
        query = {"text": parsed.text, "image": parsed.image}
        vector = embedder.encode([query], instruction=parsed.instruction)[0]
        if not parsed.json:
            console.out("     score  image", style="bold", highlight=False)
        for rank, one in enumerate(index.search(vector, parsed.top or TOP), 1):
            path = index.folder / one.file
            # `out` leaves names as they are, which `print` would wrap and read emoji codes in.
            if parsed.json:  # for programs: the very name, with escapes for what is no text
                line = json.dumps({"file": str(path), "score": round(one.score, 6)})
            else:
                line = f"{rank:>3}  {one.score:.3f}  {visible(path)}"
            console.out(line, highlight=False)
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
    parser.add_argument(
        "--top", type=int, help=f"images that are shown (default: {TOP}, on a page {TOP_OF_A_PAGE})"
    )
    parser.add_argument("--instruction", help="before the query's words, as in training")
    parser.add_argument("--index", metavar="DIR", help="where vectors are kept instead")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--serve", action="store_true", help="a page in the browser instead")
    parser.add_argument("--host", default="127.0.0.1", help="of the page (default: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="of the page (default: 8000)")
    parser.add_argument("--threads", type=int, default=4, help="that read images (default: 4)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def _tell_left_out(index: ImageIndex, log: Console) -> None:
    """The first file of each reason, and how many more there are."""
    files: dict[str, list[Path]] = {}
    for file, why in sorted(index.left_out.items()):
        files.setdefault(why, []).append(file)
    for why, some in list(files.items())[:REASONS]:
        more = f" and {len(some) - 1:,} more" if len(some) > 1 else ""
        log.out(f"left out: {visible(some[0])}{more}: {why}", highlight=False)
    if rest := sum(map(len, list(files.values())[REASONS:])):
        log.out(f"left out: {rest:,} more, for other reasons", highlight=False)


def _serve(index: ImageIndex, parsed: argparse.Namespace, console: Console) -> None:
    """Answer in other threads, and embed in this one, which signals reach."""
    waitress = extra("waitress", of="search", wanted_by="the page")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a page's thumbnails are a queue
    keeper = Keeper(index)
    hosts = LOCAL if parsed.host in LOCAL else ()
    top = parsed.top or TOP_OF_A_PAGE
    app = page(keeper, instruction=parsed.instruction, top=top, hosts=hosts)
    try:
        server = waitress.create_server(app, host=parsed.host, port=parsed.port, threads=4)
    except OSError as error:
        raise UserError(f"--port {parsed.port}: {error.strerror or error}") from error
    console.out(f"http://{parsed.host}:{server.effective_port}  (Ctrl-C ends it)", highlight=False)
    threading.Thread(target=server.run, daemon=True).start()
    try:
        keeper.run()
    finally:
        server.close()
