"""`cocoa mine` as it is typed: what it writes is read back, and trained on."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console

from cocoa_pl import mining
from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import compose_overrides, run_app
from cocoa_pl.data.digits import DigitsData
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.export.folder import export
from cocoa_pl.mining import image_root, mine, subsets_of, write_subset


def read_back(folder: Path, subsets: list[str], root: Path) -> list[Pair]:
    overrides = [
        *("data=mmeb", f"data.root={folder}", f"data.image_root={root}", "data.split=train"),
        *(f"data.subsets=[{','.join(subsets)}]", "data.caption_subsets=[]"),
        "data.validation_fraction=0",
    ]
    return list(build(compose_overrides("train", overrides).data).train_pairs())


def by_length(items: list[Item]) -> NDArray[np.float32]:
    """An embedder whose vectors turn with the length of the text."""
    angles = np.array([len(item.text) for item in items]) / 20
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def pair(query: str, positive: str, *, subset: str = "a", negatives: tuple[str, ...] = ()) -> Pair:
    own = tuple(Item(text) for text in negatives)
    return Pair(Item(query), Item(positive), own, subset, f"{subset} {query}")


def texts(items: tuple[Item, ...]) -> list[str]:
    return [item.text for item in items]


def test_negatives_are_of_the_same_subset_and_replace_the_rows_own() -> None:
    pairs = [
        pair("q", "x" * 2, negatives=("own",)),
        pair("qq", "x" * 12),
        pair("qqq", "x" * 3, subset="b"),
        pair("qqqq", "x" * 20, subset="b"),
    ]
    subsets = subsets_of(pairs)
    assert [[pair.subset for pair in rows] for rows in subsets] == [["a"] * 2, ["b"] * 2]
    first, second = (mine(rows, by_length, 3, 0.99, keep=False).pairs for rows in subsets)
    assert texts(first[0].negatives) == ["x" * 12]
    assert texts(second[0].negatives) == ["x" * 20]
    kept = mine(subsets[0], by_length, 3, 0.99, keep=True).pairs
    assert texts(kept[0].negatives) == ["own", "x" * 12]


def test_an_item_that_cannot_be_embedded_is_named_by_its_row() -> None:
    def encode(items: Sequence[Item]) -> NDArray[np.float32]:
        raise UserError("the encoded image is broken", item=len(items) - 1)

    pairs = [pair("q", "x"), pair("q", "xx"), replace(pair("qq", "x"), row_id="s row 7")]
    with pytest.raises(UserError, match=r"^s row 7: the encoded image is broken$"):
        mine(pairs, encode, 1, 1, keep=False)


def test_subsets_of_one_answer_hold_nothing_to_mine() -> None:
    pairs = [pair("q", "p"), pair("r", "p"), pair("s", "x", subset="b")]
    with pytest.raises(UserError, match="there is nothing to mine: in each subset all rows have"):
        subsets_of(pairs)


def test_rows_come_back_as_they_were(
    make_image: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """Paths, bytes, opened images, odd characters; each negative with its own picture."""
    file = tmp_path / "pictures" / "it's a [file].png"
    file.parent.mkdir()
    make_image((28, 28), seed=1).save(file)
    buffer = io.BytesIO()
    make_image((56, 28), seed=2).save(buffer, "jpeg")
    with_image = f"{IMAGE_SLOT}\nquote ' \" and \\ 好"
    pairs = [
        Pair(Item(with_image, (file,)), Item("p1"), (Item(with_image, (file,)),), "s", "row 1"),
        Pair(Item("q2"), Item(with_image, (buffer.getvalue(),)), (), "s", "row 2"),
        Pair(
            Item("q3"),
            Item(with_image, (make_image((28, 56), seed=3),)),
            (Item("plain"), Item(with_image, (buffer.getvalue(),))),
            "s",
            "row 3",
        ),
    ]
    out = tmp_path / "out"
    root = image_root(pairs, folder=out)
    write_subset(out, pairs, root=root)
    back = read_back(out, ["s"], root)
    for before, after in zip(pairs, back, strict=True):
        for old, new in zip(
            (before.query, before.positive, *before.negatives),
            (after.query, after.positive, *after.negatives),
            strict=True,
        ):
            assert new.text == old.text
            assert len(new.media) == len(old.media)
            for kept, source in zip(new.media, old.media, strict=True):
                assert isinstance(kept, Path)
                opened = source if isinstance(source, Image.Image) else Image.open(
                    io.BytesIO(source) if isinstance(source, bytes) else source
                )  # fmt: skip
                np.testing.assert_array_equal(Image.open(kept), opened)
    assert len(list((out / "images").iterdir())) == 2  # the JPEG once


def test_several_images_on_a_side_are_refused(tmp_path: Path) -> None:
    image = Image.new("RGB", (28, 28))
    row = Pair(Item(IMAGE_SLOT * 2, (image, image)), Item("p"), (), "s", "row 9")
    with pytest.raises(UserError, match=r"row 9.*one image"):
        write_subset(tmp_path, [row], root=tmp_path)


@pytest.fixture
def model(embedder: Embedder, tmp_path: Path) -> Path:
    export(embedder, tmp_path / "model", lineage=[])
    return tmp_path / "model"


def test_digits_are_mined_and_read_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    console = Console(width=140, record=True, quiet=False)
    small = ["data.scenes=60", "data.task_rows=20", "data.validation_rows=25", "cache_dir=cache"]
    out = Path("it's mined, 2 (é)")
    arguments = [str(model), f'out="{out}"', "negatives=2", *small]
    assert mining.run(arguments, console) == 0
    data = DigitsData(
        cache_dir="cache",
        seed=0,
        scenes=60,
        task_rows=20,
        validation_rows=25,
        caption_subsets=None,
    )
    expected = list(data.train_pairs())
    output = console.export_text()
    (usage,) = [line for line in output.splitlines() if line.startswith("train on it")]
    pasted: list[DictConfig] = []
    words = shlex.split(usage.removeprefix("train on it: "))
    assert run_app("train", pasted.append, [*words, "data.validation_fraction=0"]) == 0
    found = list(build(pasted[0].data).train_pairs())
    subsets = list(dict.fromkeys(pair.subset for pair in expected))
    assert list(pasted[0].data.subsets) == subsets
    assert [(p.query.text, p.positive.text) for p in found] == [
        (p.query.text, p.positive.text) for p in expected
    ]
    assert max(len(pair.negatives) for pair in found) == 2
    # Each negative is some other row's positive, and never the row's own.
    positives = {pair.positive.key for pair in found}
    for row in found:
        keys = {item.key for item in row.negatives}
        assert keys <= positives - {row.positive.key}
    for subset in subsets:
        assert subset in output
    capsys.readouterr()
    assert mining.run(arguments, console) == 2
    assert f"out={out} exists and is not empty" in capsys.readouterr().err
    Path("notes.txt").touch()
    assert mining.run([*arguments, "out=notes.txt"], console) == 2
    assert "out=notes.txt exists" in capsys.readouterr().err
    assert mining.run(["out=new"], console) == 2
    assert "say which model mines" in capsys.readouterr().err
    assert mining.run(["none", "benchmark=mmeb_v2"], Console(quiet=True)) == 2
    assert "leave out benchmark=" in capsys.readouterr().err
