"""`cocoa search` on the terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from cocoa_pl.config.process import guarded
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.search import command

from .conftest import NO_TEXT, READABLE

Run = Callable[..., str]


@pytest.fixture
def run(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command's output; its model is there already."""
    monkeypatch.setattr(command.Embedder, "load", lambda *_, **__: embedder)

    def say(*arguments: Any) -> str:
        console = Console(file=io.StringIO(), width=40)
        assert command.run([str(a) for a in (*arguments, "--model", "m")], console) == 0
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    return say


def test_the_best_come_first_with_their_scores(run: Run, folder: Path) -> None:
    for name in ("broken.png", "c.png"):
        (folder / name).write_bytes(b"no picture")
    output = run(folder, "--image", folder / "1.png", "--top", 3)
    assert f"{READABLE} images, {READABLE} of them new\n" in output
    assert "left out: broken.png and 1 more: cannot be read as an image" in output
    rows = [line.split(maxsplit=2) for line in output.splitlines()[3:]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][1:] == ["1.000", str(folder / "1.png")]


def test_names_control_no_terminal_and_in_json_paths_open(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(folder, "two boats", "--top", READABLE).splitlines()[2:]
    shown = {line.split(maxsplit=2)[2] for line in lines}
    escaped = str(folder / r"\udcff\x1b[31m\n.png")
    names = {str(file) for file in folder.rglob("*") if os.fsencode(file.name) != NO_TEXT}
    assert escaped in shown
    assert shown - {escaped} < names
    assert len(shown) == READABLE
    output = run(folder, "two boats", "--json", "--top", 100)
    assert output.isascii()
    found = [json.loads(line) for line in output.splitlines()]
    assert len(found) == READABLE
    assert found[0].keys() == {"file", "score"}
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True)
    paths = {os.fsencode(one["file"]) for one in found}
    assert os.fsencode(folder) + b"/" + NO_TEXT in paths
    assert all(map(os.path.isfile, paths))
    assert f"{READABLE} images" in capsys.readouterr().err


def test_text_image_and_instruction_all_count(run: Run, folder: Path) -> None:
    by_text = run(folder, "two boats", "--json")
    both = run(folder, "two boats", "--image", folder / "1.png", "--json")
    output = run(folder, "two boats", "--instruction", "Find it:", "--json")
    assert len({by_text, both, output}) == 3
    assert "0 of them new" in run(folder)  # without a query it indexes


def test_a_mistake_is_one_sentence(run: Run, folder: Path) -> None:
    for arguments, message in (
        (["--top", "0"], "--top is a whole number of at least 1, not 0"),
        (["--threads", "-1"], "--threads is a whole number of at least 0, not -1"),
        (["--image", "nowhere.png"], "nowhere.png does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, "two boats", *arguments)
    with pytest.raises(UserError, match="nowhere does not exist"):  # before a model is looked for
        command.run(["nowhere", "two boats", "--model", "no/model"], Console())
    pytest.importorskip("waitress")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            run(folder, "--serve", "--port", port)


def test_pillow_warns_nobody_of_a_large_picture(
    run: Run, folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    Image.new("1", (100, 1_000_000)).save(folder / "large.png")
    said: list[str] = []
    assert guarded(lambda: said.append(run(folder))) == 0
    assert "left out: large.png: is 100 x 1000000 pixels" in said[0]
    assert not [one for one in recwarn if one.category is Image.DecompressionBombWarning]


def test_a_folder_without_pictures_says_what_is_left_out(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(UserError, match="holds no image that can be read"):
        run(tmp_path, "two boats", "--json")
    assert "left out: a.heic: HEIC is not read" in capsys.readouterr().err


def test_the_page_is_served_on_this_machine_until_a_signal(
    embedder: Embedder, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waitress = pytest.importorskip("waitress")
    create, addresses, answers = waitress.create_server, [], []

    def watched(*arguments: Any, **choices: Any) -> Any:
        server = create(*arguments, **choices)
        addresses.append((server.effective_host, server.effective_port))
        return server

    embed = embedder.backbone.embed

    def then_asks(*arguments: Any) -> Any:
        """The page answers while the model embeds what it will find."""
        if addresses and not answers:
            address = "http://{}:{}/?q=".format(*addresses[0])
            answers.append(urllib.request.urlopen(address).read().decode())
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(*arguments)

    monkeypatch.setattr(waitress, "create_server", watched)
    monkeypatch.setattr(embedder.backbone, "embed", then_asks)
    assert guarded(lambda: len(run(folder, "--serve", "--port", 0))) == 130
    assert addresses[0][0] == "127.0.0.1"  # unless asked for
    assert f"Indexing: 0 of {READABLE} new images." in answers[0]
