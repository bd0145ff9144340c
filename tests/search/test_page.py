"""The page finds what the index finds, and serves nothing else of the disk."""

from __future__ import annotations

import io
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.search.index import ImageIndex
from cocoa_pl.search.page import LOCAL, THUMBNAIL, page, printable

from .conftest import HOSTILE, SECRET

flask = pytest.importorskip("flask")


@pytest.fixture
def app(index: ImageIndex) -> Any:
    return page(index, instruction=None, top=5, hosts=LOCAL)


@pytest.fixture
def client(app: Any) -> Any:
    return app.test_client()


def search(client: Any, *, text: str = "", image: bytes | None = None, name: str = "q.png") -> Any:
    data: dict[str, Any] = {"text": text}
    if image is not None:
        data["image"] = (io.BytesIO(image), name)
    return client.post("/", data=data, content_type="multipart/form-data")


def numbers(html: str) -> list[int]:
    return [int(part.split('"')[0]) for part in html.split('src="/thumbnail/')[1:]]


@pytest.mark.parametrize("kind", ["text", "image", "both"])
def test_it_shows_what_the_index_finds(
    kind: str, client: Any, index: ImageIndex, embedder: Embedder
) -> None:
    picture = (index.folder / "1.png").read_bytes()
    text = "" if kind == "image" else "two boats"
    image = None if kind == "text" else picture
    vector = embedder.encode([{"text": text, "image": image}])[0]
    expected = [found.number for found in index.search(vector, 5)]
    response = search(client, text=text, image=image)
    assert response.status_code == 200
    assert numbers(response.text) == expected
    if kind == "image":
        assert index.files[expected[0]] == Path("1.png")


def test_an_instruction_reaches_the_model(index: ImageIndex, embedder: Embedder) -> None:
    app = page(index, instruction="Find it:", top=8, hosts=LOCAL)
    html = search(app.test_client(), text="two boats").text
    vector = embedder.encode(["two boats"], instruction="Find it:")[0]
    assert numbers(html) == [found.number for found in index.search(vector, 8)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Type a text or choose an image."),
        ({"text": "   "}, "Type a text or choose an image."),
        ({"image": b"no picture"}, "cannot be read as an image"),
        ({"image": b""}, "cannot be read as an image"),
    ],
    ids=["nothing", "blank", "no picture", "empty"],
)
def test_what_cannot_be_searched_is_refused(
    given: dict[str, Any], message: str, client: Any
) -> None:
    response = search(client, **given)
    assert response.status_code == 400
    assert message in response.text
    assert "thumbnail" not in response.text


def test_names_and_texts_are_escaped(client: Any) -> None:
    text = "<script>alert(1)</script>"
    name = '"><script>alert(2)</script>.png'
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56)).save(buffer, "PNG")
    html = search(client, text=text, image=buffer.getvalue(), name=name).text
    assert "<script" not in html
    assert "onerror=alert" not in html.replace("&lt;img src=x onerror=alert(1)&gt;", "")
    assert "&lt;script&gt;alert(1)" in html


def test_thumbnails_are_small_jpegs_and_originals_are_the_files(
    client: Any, index: ImageIndex
) -> None:
    for number, file in enumerate(index.files):
        small = client.get(f"/thumbnail/{number}")
        with Image.open(io.BytesIO(small.data)) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= THUMBNAIL
        assert client.get(f"/original/{number}").data == (index.folder / file).read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "/original/8",
        "/thumbnail/999999999999999999999",
        "/original/-1",
        "/original/../notes.txt",
        "/original/..%2fnotes.txt",
        "/original/notes.txt",
        "/notes.txt",
        "/static/notes.txt",
        "/original/1/../../notes.txt",
        "//etc/passwd",
        "/original//etc/passwd",
    ],
)
def test_nothing_but_found_pictures_is_served(path: str, client: Any) -> None:
    response = client.get(path)
    assert response.status_code in (403, 404)
    assert SECRET not in response.data


def test_a_file_that_has_become_a_link_out_of_the_folder_is_not_served(
    client: Any, index: ImageIndex, tmp_path: Path
) -> None:
    number = index.files.index(Path("1.png"))
    (index.folder / "1.png").unlink()
    (index.folder / "1.png").symlink_to(tmp_path / "outside.png")
    below = index.files.index(Path("below/3.png"))
    shutil.move(index.folder / "below", tmp_path / "below")
    (index.folder / "below").symlink_to(tmp_path / "below", target_is_directory=True)
    for kind in ("original", "thumbnail"):
        assert client.get(f"/{kind}/{number}").status_code == 404
        assert client.get(f"/{kind}/{below}").status_code == 404


def test_a_file_that_is_gone_is_a_missing_picture(client: Any, index: ImageIndex) -> None:
    (index.folder / index.files[0]).unlink()
    assert client.get("/thumbnail/0").status_code == 404
    assert client.get("/original/0").status_code == 404


def test_other_sites_names_are_refused(client: Any, index: ImageIndex) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:8000"):
        assert client.get("/", headers={"Host": host}).status_code == 403
        assert client.get("/original/0", headers={"Host": host}).status_code == 403
    for host in ("127.0.0.1:8000", "localhost:8000", "localhost"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    anywhere = page(index, instruction=None, top=5, hosts=()).test_client()
    assert anywhere.get("/", headers={"Host": "my.server:80"}).status_code == 200


def test_nothing_foreign_may_run_on_the_page(client: Any) -> None:
    policy = client.get("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy  # not even its own: it has none


def test_an_upload_has_a_limit(app: Any) -> None:
    app.config["MAX_CONTENT_LENGTH"] = 1000
    assert search(app.test_client(), image=b"x" * 2000).status_code == 413


def test_a_name_is_made_printable() -> None:
    raw = Path(os.fsdecode(b"a\xff\x1b[31m.png"))
    assert printable(raw) == "a?\ufffd[31m.png"


def test_the_extra_is_named(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flask", None)
    with pytest.raises(UserError, match=r"cocoa_pl\[search\]"):
        page(index, instruction=None, top=5, hosts=LOCAL)


# --- In a browser ------------------------------------------------------------------------------


@pytest.fixture
def address(app: Any) -> Iterator[str]:
    waitress = pytest.importorskip("waitress")
    server = waitress.create_server(app, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.effective_port}/"
    server.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_a_person_searches_by_text_and_by_an_uploaded_picture(
    width: int, address: str, index: ImageIndex, browser: Any
) -> None:
    by = pytest.importorskip("selenium.webdriver.common.by").By
    errors = pytest.importorskip("selenium.common.exceptions")
    wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(
        browser, 30, ignored_exceptions=[errors.StaleElementReferenceException]
    )

    def shows(text: str) -> bool:
        return text in browser.find_element(by.TAG_NAME, "body").text

    browser.set_window_size(width, 900)
    browser.get(address)
    box = browser.switch_to.active_element  # ready to type
    assert box.get_attribute("name") == "text"
    box.send_keys("two boats\n")
    wait.until(lambda _: shows("5 nearest to “two boats”"))
    assert len(browser.find_elements(by.CSS_SELECTOR, "li img")) == 5

    def drawn(_: Any) -> bool:
        widths: list[int] = browser.execute_script(
            "return [...document.images].map(i => (i.loading = 'eager', i.naturalWidth))"
        )
        return len(widths) == 5 and all(widths)

    wait.until(drawn)

    browser.find_element(by.NAME, "text").clear()
    browser.find_element(by.NAME, "image").send_keys(str(index.folder / HOSTILE[0]))
    browser.find_element(by.TAG_NAME, "button").click()
    wait.until(lambda _: shows(f"5 nearest to the image {HOSTILE[0]}"))
    # A name is shown as it is, and escaped.
    assert browser.find_element(by.CSS_SELECTOR, "li span").text == HOSTILE[0]
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= browser.execute_script("return window.innerWidth")

    browser.find_element(by.CSS_SELECTOR, "li a").click()
    wait.until(lambda _: "/original/" in browser.current_url)
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in severe if "favicon" not in entry["message"]] == []
