"""The page finds what the index finds, and serves nothing else of the disk."""

from __future__ import annotations

import io
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.search import page as module
from cocoa_pl.search.index import ImageIndex
from cocoa_pl.search.page import LOCAL, THUMBNAIL, UPLOADS, Keeper, page

from .conftest import HOSTILE, READABLE, SECRET

flask = pytest.importorskip("flask")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60.0)  # also where the machine is busy


def app_of(index: ImageIndex, **choices: Any) -> Any:
    """The page, and a thread that keeps its index as `cocoa search` does."""
    keeper = Keeper(index)
    threading.Thread(target=keeper.run, daemon=True).start()
    given: dict[str, Any] = {"instruction": None, "top": 5, "hosts": LOCAL}
    return page(keeper, **(given | choices))


@pytest.fixture
def client(index: ImageIndex) -> Any:
    return app_of(index).test_client()


def upload(client: Any, image: bytes, *, text: str = "", name: str = "q.png", **more: Any) -> Any:
    """The page that the picture's own address shows."""
    data = {"q": text, "image": (io.BytesIO(image), name)}
    response = client.post("/", data=data, content_type="multipart/form-data", **more)
    assert response.status_code == 303
    return client.get(response.location)


def keys(html: str) -> list[int]:
    return [int(part.split('"')[0]) for part in html.split('src="/thumbnail/')[1:]]


@pytest.mark.parametrize("kind", ["text", "both"])
def test_it_shows_what_the_index_finds(kind: str, index: ImageIndex, embedder: Embedder) -> None:
    picture = (index.folder / "1.png").read_bytes()
    client, text = app_of(index, instruction="Find it:").test_client(), "two boats"
    query = {"text": text, "image": None if kind == "text" else picture}
    vector = embedder.encode([query], instruction="Find it:")[0]
    expected = [found.key for found in index.search(vector, 1000)]
    if kind == "text":
        response = client.get("/", query_string={"q": text})  # an address to link to
    else:
        response = upload(client, picture, text=text)
    assert response.status_code == 200
    assert keys(response.text) == expected[:5]
    assert f"1 to 5 of {READABLE}, the nearest first" in response.text
    address = response.request.url
    for number, part in ((2, expected[5:10]), (3, expected[10:])):
        following = client.get(f"{address}&page={number}").text
        assert keys(following) == part
        assert ('rel="next"' in following) == (number == 2)
        assert 'rel="prev"' in following
    assert "There are no more results." in client.get(f"{address}&page=4").text
    assert keys(client.get(f"{address}&page=none").text) == expected[:5]


def test_another_text_keeps_the_picture_and_the_last_few_pictures_are_kept(
    client: Any, index: ImageIndex, make_image: Callable[..., Image.Image]
) -> None:
    pictures = []
    for seed in range(UPLOADS + 1):
        make_image((56, 56), seed=seed).save(buffer := io.BytesIO(), "PNG")
        pictures.append(upload(client, buffer.getvalue()).request.url)
    last = pictures[-1].rpartition("=")[2]
    response = client.post("/", data={"q": "two boats", "picture": last})
    assert response.location == f"/?q=two+boats&image={last}"
    assert f'src="/asked/{last}"' in client.get(response.location).text
    assert client.get(f"/asked/{last}").mimetype == "image/jpeg"
    assert [client.get(address).status_code for address in pictures] == [410] + [200] * UPLOADS
    assert "not kept any more; choose it again" in client.get(pictures[0]).text


def test_it_sees_new_changed_and_deleted_files(
    client: Any,
    index: ImageIndex,
    make_image: Callable[..., Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []
    update = index.update
    monkeypatch.setattr(index, "update", lambda: (looks.append(1), update())[1])
    for _ in range(5):
        client.get("/?q=two boats")
    assert len(looks) <= 1  # not more often than needed
    monkeypatch.setattr(module, "FRESH", 0.0)
    make_image((56, 56), seed=50).save(index.folder / "new.png")
    make_image((56, 56), seed=51).save(index.folder / "1.png")
    (index.folder / "2.JPG").unlink()
    while Path("new.png") not in index.files.values():  # a look serves for as long as it took
        client.get("/?q=two boats")
    html = upload(client, (index.folder / "1.png").read_bytes()).text
    assert f"{READABLE} images" in html
    assert html.split('alt="')[2].startswith("1.png")
    shutil.rmtree(index.folder)
    while "does not exist" not in client.get("/?q=two boats").text:
        pass


def test_while_it_indexes_it_answers_with_what_is_there(
    index: ImageIndex, make_image: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FRESH", 0.0)
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    go_on = threading.Event()
    keep = index.kept.add
    monkeypatch.setattr(index.kept, "add", lambda parts: (go_on.wait(60), keep(parts)))
    make_image((56, 56), seed=50).save(index.folder / "new.png")
    client = app_of(index).test_client()
    while "of 1 new" not in client.get("/status").json["progress"]:
        pass
    html = client.get("/?q=two boats").text
    assert "of 1 new images. A search finds those that are done." in html
    assert f"{READABLE} images" in html
    assert len(keys(html)) == 5
    go_on.set()
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    assert f"{READABLE + 1} images" in client.get("/?q=two boats").text
    assert client.get("/status").json == {"progress": ""}


def test_an_empty_folder_and_what_is_left_out_are_told(tmp_path: Path, embedder: Embedder) -> None:
    (tmp_path / "<a>.heic").touch()
    client = app_of(ImageIndex(tmp_path, embedder, kept_in=None, threads=0)).test_client()
    html = client.get("/").text
    assert "There is no image in this folder yet." in html
    assert "1 left out" in html
    assert "&lt;a&gt;.heic: HEIC is not read; convert it to JPEG" in html


def test_who_asks_during_the_first_look_is_served_by_it(
    index: ImageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FRESH", 0.0)
    looks, go_on = [], threading.Event()
    monkeypatch.setattr(index, "update", lambda: (looks.append(1), go_on.wait(60)))
    client = app_of(index).test_client()
    asking = threading.Thread(target=client.get, args=["/"])
    asking.start()
    asking.join(0.2)
    assert asking.is_alive()
    go_on.set()
    asking.join(60)
    assert looks == [1]
    client.get("/")
    assert looks == [1, 1]


# --- What it must not do -----------------------------------------------------------------------


def png(*size: int) -> bytes:
    Image.new("1", size).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def test_what_cannot_be_searched_is_refused(client: Any) -> None:
    for image, message in (
        (b"no picture", "its content is none of AVIF"),
        (b"", "cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "its content is none of AVIF"),
        (png(13_000, 13_000), "is 13000 x 13000 pixels, more than 25,000,000; scale it"),
    ):
        response = upload(client, image)
        assert response.status_code == 400
        assert message in response.text
        assert "thumbnail" not in response.text
    response = client.get("/?q=%EF%B7%90")
    assert response.status_code == 400
    assert "That cannot be searched: the text holds U+FDD0" in response.text
    client.application.config["MAX_CONTENT_LENGTH"] = 1000
    response = client.post("/", data={"image": (io.BytesIO(b"x" * 2000), "a.png")})
    assert response.status_code == 413
    assert "larger than" in response.text


def test_one_picture_is_decoded_at_a_time_and_thumbnails_once(
    client: Any, index: ImageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, decoded, lock = 0, [], threading.Lock()
    original = module.open_image

    def watched(source: Any, **choices: Any) -> Image.Image:
        nonlocal inside
        with lock:
            inside += 1
            decoded.append((inside, choices["most_pixels"]))
        image = original(source, **choices)
        with lock:
            inside -= 1
        return image

    monkeypatch.setattr(module, "open_image", watched)
    addresses = [f"/thumbnail/{key}" for key in index.files]
    for _ in range(2):
        threads = [threading.Thread(target=client.get, args=[each]) for each in addresses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert decoded == [(1, module.MOST_PIXELS)] * READABLE


def test_thumbnails_are_small_jpegs_and_originals_are_the_files(
    client: Any, index: ImageIndex
) -> None:
    for key, file in index.files.items():
        small = client.get(f"/thumbnail/{key}")
        with Image.open(io.BytesIO(small.data)) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= THUMBNAIL
        original = client.get(f"/original/{key}")
        assert original.data == (index.folder / file).read_bytes()
        assert original.mimetype.startswith("image/")


def test_nothing_but_the_found_pictures_of_the_folder_is_served(
    client: Any, index: ImageIndex, tmp_path: Path
) -> None:
    for path in (
        *("/original/8", "/original/zz", "/thumbnail/999999999999999999999", "/thumbnail/-1"),
        *("/asked/0", "/notes.txt", "/static/notes.txt", "/original/notes.txt", "//etc/passwd"),
        *("/original/../notes.txt", "/original/..%2fnotes.txt", "/original/1/../../notes.txt"),
        "/original//etc/passwd",
    ):
        response = client.get(path)
        assert response.status_code in (403, 404), path
        assert SECRET not in response.data
    numbers = {str(file): key for key, file in index.files.items()}
    assert client.get(f"/thumbnail/{numbers['1.png']}").status_code == 200  # and remembered
    (index.folder / "1.png").unlink()
    (index.folder / "1.png").symlink_to(tmp_path / "outside.png")
    (index.folder / "2.JPG").unlink()
    shutil.move(index.folder / "below", tmp_path / "below")
    (index.folder / "below").symlink_to(tmp_path / "below", target_is_directory=True)
    for name in ("1.png", "2.JPG", "below/3.png"):
        for kind in ("original", "thumbnail"):
            assert client.get(f"/{kind}/{numbers[name]}").status_code == 404


def test_other_names_are_refused_and_another_site_may_link_and_nothing_else(
    index: ImageIndex, client: Any
) -> None:
    for headers, may_post, may_get in (
        ({}, True, True),  # of no browser
        ({"Host": "127.0.0.1:8000"}, True, True),
        ({"Host": "[::1]:8000"}, True, True),
        ({"Host": "evil.example"}, False, False),
        ({"Host": "127.0.0.1.evil.example:8000"}, False, False),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, True, True),
        ({"Origin": "http://localhost"}, True, True),
        ({"Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "document"}, True, True),  # typed
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, False, True),  # a link
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "document"}, False, True),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}, False, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"}, False, False),
        ({"Origin": "http://evil.example"}, False, False),
        ({"Origin": "http://localhost:3000"}, False, False),
        ({"Origin": "null"}, False, False),
    ):
        posted = client.post("/", data={"q": "two boats"}, headers=headers).status_code
        assert posted == (303 if may_post else 403), headers
        got = client.get("/?q=two boats", headers=headers).status_code
        assert got == (200 if may_get else 403), headers
    anywhere = app_of(index, hosts=()).test_client()
    assert anywhere.get("/", headers={"Host": "my.server:80"}).status_code == 200


def test_names_and_texts_are_escaped_and_nothing_foreign_may_run_on_the_page(client: Any) -> None:
    asked = {"q": '"><script>alert(1)</script>'}
    every = [client.get("/", query_string={**asked, "page": n}).text for n in (1, 2, 3)]
    assert all(html.count("<script") == 1 for html in every)  # its own
    assert all("&lt;script&gt;alert(1)" in html for html in every)
    html = "".join(every)
    assert html.count(escaped := "&lt;img src=x onerror=alert(1)&gt;") > 0
    assert "onerror=alert" not in html.replace(escaped, "")
    pages = [client.get("/") for _ in range(2)]
    policies = [response.headers["Content-Security-Policy"] for response in pages]
    for response, policy in zip(pages, policies, strict=True):
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
        assert response.text.count(f'<script nonce="{nonce}">') == 1
        assert "http" not in response.text  # no address of anywhere
    assert policies[0] != policies[1]
    assert "script-src" not in client.get("/status").headers["Content-Security-Policy"]


def test_the_extra_is_named(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flask", None)
    with pytest.raises(UserError, match=r"cocoa_pl\[search\]"):
        page(Keeper(index), instruction=None, top=5, hosts=LOCAL)


# --- In a browser ------------------------------------------------------------------------------


DROP = """
const [name, bytes, kind] = arguments, data = new DataTransfer();
data.items.add(new File([Uint8Array.from(bytes)], name, {type: "image/png"}));
const event = kind === "paste" ? new ClipboardEvent(kind, {clipboardData: data, bubbles: true})
  : new DragEvent(kind, {dataTransfer: data, bubbles: true});
document.body.dispatchEvent(event);
"""


@pytest.mark.parametrize(("width", "way"), [(1280, "drop"), (400, "paste"), (400, "choose")])
def test_a_person_searches_by_text_and_by_a_picture(
    width: int, way: str, index: ImageIndex, browser: Any
) -> None:
    waitress = pytest.importorskip("waitress")
    server = waitress.create_server(app_of(index), host="127.0.0.1", port=0)
    threading.Thread(target=server.run, daemon=True).start()
    address = f"http://127.0.0.1:{server.effective_port}/"
    by = pytest.importorskip("selenium.webdriver.common.by").By
    errors = pytest.importorskip("selenium.common.exceptions")
    wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(
        browser, 30, ignored_exceptions=[errors.StaleElementReferenceException]
    )
    browser.set_window_size(width, 900)
    browser.get(address)
    box = browser.switch_to.active_element  # ready to type
    assert box.get_attribute("name") == "q"
    box.send_keys("two boats\n")
    wait.until(lambda _: browser.current_url == f"{address}?q=two+boats")

    def drawn(_: Any) -> bool:
        widths: list[int] = browser.execute_script(
            "return [...document.images].map(i => (i.loading = 'eager', i.naturalWidth))"
        )
        return len(widths) >= 5 and all(widths)

    wait.until(drawn)
    browser.find_element(by.LINK_TEXT, "Next").click()
    wait.until(lambda _: browser.current_url.endswith("page=2"))

    browser.find_element(by.NAME, "q").clear()  # a picture beside the text would be one query
    picture = index.folder / HOSTILE[0]
    if way == "choose":
        browser.find_element(by.NAME, "image").send_keys(str(picture))
    else:
        browser.execute_script(DROP, picture.name, list(picture.read_bytes()), way)
    wait.until(lambda _: "image=" in browser.current_url)
    wait.until(drawn)
    # A name is shown as it is, and escaped.
    assert browser.find_element(by.CSS_SELECTOR, "li span").text == HOSTILE[0]
    assert browser.find_element(by.CSS_SELECTOR, "li img").get_attribute("alt") == HOSTILE[0]
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= browser.execute_script("return window.innerWidth")
    browser.back()
    wait.until(lambda _: browser.current_url.endswith("page=2"))

    browser.find_element(by.CSS_SELECTOR, "li a").click()
    wait.until(lambda _: "/original/" in browser.current_url)
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in severe if "favicon" not in entry["message"]] == []
    server.close()
