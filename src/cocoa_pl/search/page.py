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
from cocoa_pl.search.folder import is_inside
from cocoa_pl.search.index import Found, ImageIndex

THUMBNAIL = 256  # pixels of the longer side
MOST_UPLOADED = 50 * 2**20  # bytes
LOCAL = ("127.0.0.1", "localhost")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; "
    "form-action 'self'; frame-ancestors 'none'",
}


class Page:
    """A form, and the images nearest to what was asked.

    Args:
        instruction: for queries, as `Embedder.encode` takes it.
        top: images that a search shows.
        hosts: names that a browser may know this page by: another site whose name is made to point
            here gets nothing. Empty for any.

    Raises:
        UserError: without flask.
    """

    def __init__(
        self,
        index: ImageIndex,
        *,
        instruction: str | None,
        top: int,
        hosts: Sequence[str],
    ) -> None:
        self.flask = extra("flask", of="search", wanted_by="the page")
        self.index = index
        self.instruction = instruction
        self.top = top
        self.hosts = hosts

    def app(self) -> Any:
        """The WSGI application."""
        app = self.flask.Flask(__name__, template_folder=str(Path(__file__).parent))
        app.jinja_env.autoescape = True  # flask's own rule knows no .j2: names would become HTML
        app.config["MAX_CONTENT_LENGTH"] = MOST_UPLOADED
        app.before_request(self._refuse_foreign_names)
        app.after_request(_with_headers)
        app.add_url_rule("/", view_func=self.start)
        app.add_url_rule("/", view_func=self.search, methods=["POST"])
        app.add_url_rule("/thumbnail/<int:number>", view_func=self.thumbnail)
        app.add_url_rule("/original/<int:number>", view_func=self.original)
        return app

    def start(self) -> str:
        """The form alone."""
        return self._html()

    def search(self) -> Any:
        """The form, and what is nearest to its text, its image, or both."""
        text = self.flask.request.form.get("text", "").strip()
        upload = self.flask.request.files.get("image")
        named = upload is not None and bool(upload.filename)
        if not text and not named:
            return self._html(wrong="Type a text or choose an image."), 400
        query = {"text": text, "image": upload.read() if named else None}
        try:
            vector = self.index.embedder.encode([query], instruction=self.instruction, threads=0)[0]
        except UserError as error:
            return self._html(text, wrong=f"That cannot be searched: {error}"), 400
        asked = [f"“{text}”" if text else "", f"the image {upload.filename}" if named else ""]
        found = self.index.search(vector, self.top)
        return self._html(text, asked=" and ".join(filter(None, asked)), found=found)

    def thumbnail(self, number: int) -> Any:
        """A small JPEG."""
        try:
            image = open_image(self._path(number), where="thumbnail").copy()
        except UserError:
            self.flask.abort(404)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        return self.flask.Response(buffer.getvalue(), mimetype="image/jpeg")

    def original(self, number: int) -> Any:
        """The file as it is."""
        path = self._path(number)
        # Opened here: a header cannot hold every name that a file system can.
        return self.flask.send_file(
            path.open("rb"), mimetype=mimetypes.guess_type(path.name)[0] or "image/*"
        )

    def _path(self, number: int) -> Path:
        if number < len(self.index.files):
            path: Path = self.index.folder / self.index.files[number]
            if is_inside(path, self.index.folder):
                return path
        self.flask.abort(404)
        raise AssertionError("abort raises")

    def _html(
        self, text: str = "", *, asked: str = "", wrong: str = "", found: Sequence[Found] = ()
    ) -> str:
        html: str = self.flask.render_template(
            "page.html.j2",
            folder=printable(self.index.folder),
            count=len(self.index.files),
            text=text,
            asked=asked,
            wrong=wrong,
            found=[(one.number, printable(one.file), one.score) for one in found],
        )
        return html

    def _refuse_foreign_names(self) -> None:
        name = self.flask.request.host.rpartition(":")[0] or self.flask.request.host
        if self.hosts and name not in self.hosts:
            self.flask.abort(403)


def printable(path: Path) -> str:
    """A name as text, whatever bytes it is made of, and no control of anybody's terminal."""
    name = str(path).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def _with_headers(response: Any) -> Any:
    response.headers.update(HEADERS)
    return response
