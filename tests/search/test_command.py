"""`cocoa search` on the terminal."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cocoa_pl.cli import COMMANDS
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.search import command

Run = Callable[..., str]


@pytest.fixture
def run(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command's output; its model is there already."""
    monkeypatch.setattr(command.Embedder, "load", lambda *_, **__: embedder)

    def say(*arguments: Any) -> str:
        console = Console(file=io.StringIO(), width=200)
        assert command.run([str(a) for a in (*arguments, "--model", "m")], console) == 0
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    return say


def test_it_is_a_command() -> None:
    assert f"cocoa_pl.{COMMANDS['search'][0]}" == command.__name__


def test_the_best_come_first_with_their_scores(run: Run, folder: Path) -> None:
    output = run(folder, "--image", folder / "1.png", "--top", 3)
    assert "8 images, 8 of them new" in output
    assert "broken.png left out: " in output
    rows = [line.split() for line in output.splitlines() if line.strip()[:1].isdigit()][1:]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][1] == "1.000"
    assert rows[0][2] == str(folder / "1.png")


def test_names_are_no_markup(run: Run, folder: Path) -> None:
    output = run(folder, "two boats")
    assert '"quoted" & [bold].png' in output
    assert "<img src=x onerror=alert(1)>.png" in output


def test_json_is_one_object_a_line(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in run(folder, "two boats", "--json").splitlines()]
    assert len(lines) == 8
    assert lines[0].keys() == {"file", "score"}
    scores = [line["score"] for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert "8 images" in capsys.readouterr().err


def test_text_image_and_instruction_all_count(run: Run, folder: Path) -> None:
    by_text = run(folder, "two boats", "--json")
    both = run(folder, "two boats", "--image", folder / "1.png", "--json")
    output = run(folder, "two boats", "--instruction", "Find it:", "--json")
    assert len({by_text, both, output}) == 3


def test_without_a_query_it_indexes(run: Run, folder: Path) -> None:
    assert "8 of them new" in run(folder)
    assert "0 of them new" in run(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "0"], "--top is at least 1, not 0"),
        (["--image", "nowhere.png"], "nowhere.png does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], message: str, run: Run, folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, "two boats", *arguments)


def test_a_wrong_folder_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(UserError, match="nowhere is no folder"):
        command.run(["nowhere", "two boats", "--model", "no/model"], Console())


def test_a_port_that_is_taken_is_reported(run: Run, folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            run(folder, "--serve", "--port", port)


def test_the_page_is_served_until_ctrl_c(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waitress = pytest.importorskip("waitress")
    closed: list[str] = []

    class Server:
        effective_port = 8123

        def run(self) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            closed.append("closed")

    def create(app: Any, *, host: str, port: int, threads: int) -> Server:
        client = app.test_client()
        assert client.get("/", headers={"Host": f"127.0.0.1:{port}"}).status_code == 200
        assert host == "127.0.0.1"  # unless asked for
        return Server()

    monkeypatch.setattr(waitress, "create_server", create)
    assert "http://127.0.0.1:8123" in run(folder, "--serve")
    assert closed == ["closed"]
