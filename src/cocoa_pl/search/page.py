"""A small web page that searches an index.

Images are asked for by their number in the index, never by a path, and a file that by now lies
outside of the folder is not served.
"""

from __future__ import annotations

import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cocoa_pl.data.images import open_image
from cocoa_pl.errors import UserError, extra
from cocoa_pl.search.index import Found, ImageIndex, is_inside

THUMBNAIL = 256  # pixels of the longer side
MOST_UPLOADED = 50 * 2**20  # bytes
LOCAL = ("127.0.0.1", "localhost")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; "
    "form-action 'self'; frame-ancestors 'none'",
}


def page(index: ImageIndex, *, instruction: str | None, top: int, hosts: Sequence[str]) -> Any:
    """The WSGI application: a form, and the images nearest to what was asked.

    Args:
        instruction: for queries, as `Embedder.encode` takes it.
        top: images that a search shows.
        hosts: names that a browser may know this page by: another site whose name is made to point
            here gets nothing. Empty for any.

    Raises:
        UserError: without flask.
    """
    flask = extra("flask", of="search", wanted_by="the page")
    app = flask.Flask(__name__, template_folder=str(Path(__file__).parent))
    app.jinja_env.autoescape = True  # flask's own rule knows no .j2: names would become HTML
    app.config["MAX_CONTENT_LENGTH"] = MOST_UPLOADED

    def refuse_foreign_names() -> None:
        name = flask.request.host.rpartition(":")[0] or flask.request.host
        if hosts and name not in hosts:
            flask.abort(403)

    def with_headers(response: Any) -> Any:
        response.headers.update(HEADERS)
        return response

    def html(
        text: str = "", *, asked: str = "", wrong: str = "", found: Sequence[Found] = ()
    ) -> Any:
        return flask.render_template(
            "page.html.j2",
            folder=printable(index.folder),
            count=len(index.files),
            text=text,
            asked=asked,
            wrong=wrong,
            found=[(one.number, printable(one.file), one.score) for one in found],
        )

    def path_of(number: int) -> Path:
        if number < len(index.files):
            path = index.folder / index.files[number]
            if is_inside(path, index.folder):
                return path
        return flask.abort(404)  # it raises

    def search() -> Any:
        text = flask.request.form.get("text", "").strip()
        upload = flask.request.files.get("image")
        named = upload is not None and bool(upload.filename)
        if not text and not named:
            return html(wrong="Type a text or choose an image."), 400
        query = {"text": text, "image": upload.read() if named else None}
        try:
            vector = index.embedder.encode([query], instruction=instruction, threads=0)[0]
        except UserError as error:
            return html(text, wrong=f"That cannot be searched: {error}"), 400
        asked = [f"“{text}”" if text else "", f"the image {upload.filename}" if named else ""]
        found = index.search(vector, top)
        return html(text, asked=" and ".join(filter(None, asked)), found=found)

    def thumbnail(number: int) -> Any:
        try:
            image = open_image(path_of(number), where="thumbnail").copy()
        except UserError:
            flask.abort(404)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        return flask.Response(buffer.getvalue(), mimetype="image/jpeg")

    def original(number: int) -> Any:
        path = path_of(number)
        # Opened here: a header cannot hold every name that a file system can.
        return flask.send_file(
            path.open("rb"), mimetype=mimetypes.guess_type(path.name)[0] or "image/*"
        )

    app.before_request(refuse_foreign_names)
    app.after_request(with_headers)
    app.add_url_rule("/", view_func=html)
    app.add_url_rule("/", view_func=search, methods=["POST"])
    app.add_url_rule("/thumbnail/<int:number>", view_func=thumbnail)
    app.add_url_rule("/original/<int:number>", view_func=original)
    return app


def printable(path: Path) -> str:
    """A name as text, whatever bytes it is made of, and no control of anybody's terminal."""
    name = str(path).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "\ufffd" for c in name)
