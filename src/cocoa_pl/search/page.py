"""A small web page that searches an index.

Images are asked for by their key in the index, never by a path, and a file that by now lies outside
of the folder is not served.
"""

from __future__ import annotations

import hashlib
import io
import mimetypes
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.data.images import open_image
from cocoa_pl.errors import UserError, extra, visible
from cocoa_pl.search.index import ImageIndex, is_inside

THUMBNAIL = 320  # pixels of the longer side
MOST_UPLOADED = 25 * 2**20  # bytes
MOST_PIXELS = 25_000_000  # of what is decoded: 0.5 GB at worst, while alpha is laid on white
ENOUGH = 2200  # pixels of a side to search by: a phone's JPEG of 48 million is decoded at a half
UPLOADS = 8  # pictures to search by that are kept, so that their addresses work
LOCAL = ("127.0.0.1", "localhost", "::1")
FRESH = 2.0  # seconds for which the folder is not looked at again
PATIENCE = 1.5  # seconds that a search waits for new files
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, forms would come from the origin "null"
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = (
    "default-src 'none'; img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; style-src {style}"
)


class Keeper:
    """Keeps an index up to date in the thread that calls `run`, while others search it."""

    def __init__(self, index: ImageIndex) -> None:
        self.index = index
        self.trouble = ""  # why the last update failed
        self._changed = threading.Condition()
        self._seen = self._asked = -np.inf  # when the last finished update began; the last request
        self._took = 0.0

    def run(self) -> NoReturn:
        """Update whenever `refresh` asks for it, beginning at once."""
        while True:
            began = time.monotonic()
            try:
                self.index.update()
                self.trouble = ""
            except UserError as error:
                self.trouble = str(error)
            with self._changed:
                self._seen, self._took = began, time.monotonic() - began
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._is_fresh(self._asked))

    def refresh(self) -> None:
        """Have the folder looked at unless that was just done, and wait a moment for it."""
        with self._changed:
            self._asked = asked = time.monotonic()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_fresh(asked), timeout=PATIENCE)

    def _is_fresh(self, asked: float) -> bool:
        """Whether the last update serves who asks then: it may be as old as it took."""
        return self._seen >= asked - max(FRESH, self._took)


def page(keeper: Keeper, *, instruction: str | None, top: int, hosts: Sequence[str]) -> Any:
    """The WSGI application: a form, and the images nearest to what was asked.

    Args:
        instruction: for queries, as `Embedder.encode` takes it.
        top: images that a page of results shows.
        hosts: names that a browser may know this page by: another site whose name is made to point
            here gets nothing. Empty for any.

    Raises:
        UserError: without flask.
    """
    flask = extra("flask", of="search", wanted_by="the page")
    app = flask.Flask(__name__, template_folder=str(Path(__file__).parent))
    app.jinja_env.autoescape = True  # flask's own rule knows no .j2: names would become HTML
    app.config["MAX_CONTENT_LENGTH"] = MOST_UPLOADED
    index = keeper.index
    uploads: OrderedDict[str, bytes] = OrderedDict()
    # For their memory one picture at a time each, and in one thread: each has a heap of its own,
    # which keeps what was freed.
    searching, drawing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def refuse_other_sites() -> None:
        """Names that were made to point here, and requests that another site's page sends; but
        anybody may link to a search.
        """
        request = flask.request
        if hosts and re.sub(r":\d*$", "", request.host).strip("[]") not in hosts:
            flask.abort(403)
        site = request.headers.get("Sec-Fetch-Site", "none")
        # A link that is followed; frames, pictures and scripts of another page have other uses.
        is_link = request.method == "GET" and request.headers.get("Sec-Fetch-Dest") == "document"
        origin = request.headers.get("Origin")  # of browsers without Sec-Fetch
        is_own = origin is None or origin.partition("//")[2] == request.host
        if (site not in ("same-origin", "none") and not is_link) or not is_own:
            flask.abort(403)

    def with_headers(response: Any) -> Any:
        # A browser's own page around a picture has styles, and no script.
        style = f"'nonce-{nonce}'" if (nonce := flask.g.get("nonce")) else "'unsafe-inline'"
        script = f"; script-src 'nonce-{nonce}'" if nonce else ""
        response.headers.update(HEADERS)
        response.headers["Content-Security-Policy"] = POLICY.format(style=style) + script
        return response

    def html(status: int = 200, **said: Any) -> Any:
        flask.g.nonce = secrets.token_urlsafe(16)
        given = {
            "folder": visible(index.folder),
            "count": len(index.files),
            "num_left_out": len(index.left_out),
            "left_out": [
                (visible(file), why) for file, why in sorted(index.left_out.items())[:100]
            ],
            "progress": how_far(index.progress),
            "wrong": keeper.trouble,
            "nonce": flask.g.nonce,
        }
        return flask.render_template("page.html.j2", **(given | said)), status

    @lru_cache(maxsize=256)
    def vector_of(text: str, picture: str) -> NDArray[np.float32]:
        def embedded() -> NDArray[np.float32]:
            image = None
            if picture:
                image = open_image(uploads[picture], at_least=ENOUGH, most_pixels=MOST_PIXELS)
            query = {"text": text, "image": image}
            return index.embedder.encode([query], instruction=instruction, threads=0)[0]

        return searching.submit(embedded).result()

    @lru_cache(maxsize=1024)  # some 20 MB
    def thumbnail_of(key: int | str) -> bytes:
        def drawn() -> bytes:
            source = uploads[key] if isinstance(key, str) else index.folder / index.files[key]
            image = open_image(source, at_least=THUMBNAIL, most_pixels=MOST_PIXELS)
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            image.save(buffer := io.BytesIO(), "JPEG", quality=85)
            return buffer.getvalue()

        return drawing.submit(drawn).result()

    def search() -> Any:
        arguments = flask.request.args
        text, picture = arguments.get("q", "").strip(), arguments.get("image", "")
        number = max(arguments.get("page", 1, type=int), 1)
        keeper.refresh()
        asked = {"text": text, "picture": picture, "number": number}
        if not text and not picture:
            return html(**asked)
        if picture and picture not in uploads:
            asked["picture"] = ""
            return html(410, wrong="That picture is not kept any more; choose it again.", **asked)
        try:
            vector = vector_of(text, picture)
        except UserError as error:
            return html(400, wrong=f"That cannot be searched: {error.message}", **asked)
        found = index.search(vector, top + 1, skip=(number - 1) * top)
        results = [(one.key, visible(one.file), one.score) for one in found[:top]]
        return html(results=results, first=(number - 1) * top, more=len(found) > top, **asked)

    def upload() -> Any:
        """A picture gets an address, so that its results have one."""
        form, file = flask.request.form, flask.request.files.get("image")
        text, picture = form.get("q", "").strip(), form.get("picture", "")
        if file is not None and file.filename:
            content = file.read()
            picture = hashlib.blake2b(content, digest_size=12).hexdigest()
            uploads[picture] = content
            uploads.move_to_end(picture)
            if len(uploads) > UPLOADS:
                uploads.popitem(last=False)
        given = {"q": text, "image": picture}
        return flask.redirect(flask.url_for("search", **{n: v for n, v in given.items() if v}), 303)

    def status() -> Any:
        return {"progress": how_far(index.progress)}

    def path_of(key: int) -> Path:
        file = index.files.get(key)
        if file is not None and is_inside(index.folder / file, index.folder):
            return index.folder / file
        return flask.abort(404)  # it raises

    def thumbnail(key: int) -> Any:
        path_of(key)
        return small(key)

    def small(key: int | str) -> Any:
        try:
            content = thumbnail_of(key)
        except (UserError, KeyError):  # the latter: it was forgotten meanwhile
            flask.abort(404)
        response = flask.Response(content, mimetype="image/jpeg")
        response.headers["Cache-Control"] = "private, max-age=86400"
        return response

    def original(key: int) -> Any:
        path = path_of(key)
        # Opened here: a header cannot hold every name that a file system can. A type of an image
        # whatever the name says: nothing that could run.
        kind = mimetypes.guess_type(path.name)[0] or ""
        kind = kind if kind.startswith("image/") else "image/jpeg"
        try:
            return flask.send_file(path.open("rb"), mimetype=kind)
        except OSError:  # it may not be read, or went meanwhile
            return flask.abort(404)

    def too_large(error: Exception) -> Any:
        return html(413, wrong=f"That file is larger than {MOST_UPLOADED >> 20} MiB; scale it.")

    app.before_request(refuse_other_sites)
    app.after_request(with_headers)
    app.register_error_handler(413, too_large)
    app.add_url_rule("/", view_func=search)
    app.add_url_rule("/", view_func=upload, methods=["POST"])
    app.add_url_rule("/status", view_func=status)
    app.add_url_rule("/thumbnail/<int:key>", view_func=thumbnail)
    app.add_url_rule("/asked/<key>", view_func=small)
    app.add_url_rule("/original/<int:key>", view_func=original)
    return app


def how_far(progress: tuple[int, int] | None) -> str:
    """How far an update is, for a person; empty if there is none."""
    if progress is None:
        return ""
    done, of = progress
    if not of:
        return "Looking at the folder."
    return f"Indexing: {done:,} of {of:,} new images. A search finds those that are done."
