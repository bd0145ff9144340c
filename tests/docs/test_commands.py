"""The commands and the Python of the README and of docs/ are run as they stand there, on the
smallest model that works; small folders and models stand in for published ones. What needs several
machines, a GPU, hours or the hub is composed by tests/test_readme.py.
"""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cocoa_pl import cli
from cocoa_pl.attention import Policy
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.models.loading import FAMILIES, Loaded, load
from tests.docs.pages import HERE, PAGES, PYTHON, ROOT
from tests.docs.published import write_models, write_published
from tests.files import write_noise
from tests.processes import run_script
from tests.small import SMALL_BENCHMARK, SMALL_DIGITS, SMALL_TRAINING, STAGES


def test_most_commands_are_run() -> None:
    assert len(HERE) >= 25
    assert {command.split()[1] for command in HERE if command.startswith("cocoa")} == set(
        cli.COMMANDS
    )


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: the examples, pictures, rows of one's own."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "docs").symlink_to(ROOT / "docs")
    dogs = [f"images/dogs/{number}.jpg" for number in range(40)]
    for number, path in enumerate(("scene.png", "pictures/a.png", "pictures/b.png", *dogs)):
        write_noise(folder / path, (56, 56), seed=number)
    row = re.search(r'^{"query_image": "dogs/7.jpg".*}$', PAGES[0].read_text(), re.MULTILINE)
    assert row
    rows = [row[0].replace("7", str(n)).replace("sofa", f"sofa {n}") for n in range(40)]
    (folder / "my.jsonl").write_text("\n".join(rows))
    write_published(folder)
    return folder


@pytest.fixture(scope="module")
def stand_ins(sandbox: Path) -> dict[str, Path]:
    texts = [f"picture {n} of A, find it, which is a dog asleep on sofa {n}?" for n in range(30)]
    return write_models(sandbox / "models", texts=texts)


@pytest.fixture(autouse=True)
def as_before(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands are run in the sandbox."""
    monkeypatch.chdir(sandbox)
    monkeypatch.setattr("cocoa_pl.for_mteb.digits.CACHE_DIR", str(sandbox / ".cache"))
    families = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(families)


FIRST = "python train.py hydra.run.dir=runs/A"  # what others begin with
REAL = re.compile(r"^(?:model=(qwen\w+)|experiment=paper_(qwen\w+?_\db|qwen2vl))")
# The paper's steps and batches, and a stand-in's one process.
SMALL_REAL = [
    *(
        f"stage.{stage}.{key}"
        for stage in STAGES
        for key in (
            *("steps=2", "epochs=null", "optimization.warmup_steps=2", "batch_size=8"),
            "max_rows_per_subset=8",
        )
    ),
    *("trainer=cpu", "logger=none", "num_workers=0", "model.dtype=float32"),
]


def smaller(words: list[str], stand_ins: dict[str, Path]) -> list[str]:
    """The overrides that make it small, as far as the command has what they change."""
    if any(word.startswith("resume=") for word in words) or words[:2] == ["cocoa", "plan"]:
        return []  # a resumed run keeps its config; a plan reads nothing
    real = next((m[1] or m[2] for word in words if (m := REAL.match(word))), None)
    if real is not None:
        doctor = ["workers=0"] if words[0] == "cocoa" else []
        own = any(word.startswith("model.source._target_") for word in words)
        path = [] if own else [f"model.source.path={stand_ins[_config_of(real)]}"]
        on_digits = SMALL_DIGITS + SMALL_BENCHMARK if own else []
        held_out = [] if own or "data=paper" in words else ["data.validation_fraction=0.3"]
        return [*path, *SMALL_REAL, *doctor, *on_digits, *held_out]
    has_digits = not any(w.startswith("data=") and w != "data=digits" for w in words)
    scores_digits = has_digits and not any(w.startswith("benchmark=") for w in words)
    if words[1] == "train.py":
        return [*SMALL_TRAINING, *SMALL_BENCHMARK * scores_digits, *SMALL_DIGITS * has_digits]
    if words[1] == "evaluate.py":
        return SMALL_BENCHMARK * scores_digits
    if words[:2] == ["cocoa", "mine"]:
        return SMALL_DIGITS
    if words[:2] == ["cocoa", "doctor"]:
        return ["workers=0", *SMALL_TRAINING, *(SMALL_DIGITS + SMALL_BENCHMARK) * has_digits]
    return []


def _config_of(experiment: str) -> str:
    """`qwen2vl_2b` of an experiment is `model=qwen2vl`."""
    return experiment.removesuffix("_2b")


def marked(command: str) -> Any:
    """Sweeps are many runs, published models and mteb's tasks take long to open, and what choose
    a checkpoint or end a stage are whole recipes. Of commands that differ in values one is run by
    default.
    """
    long = (" -m ", "benchmark=mteb", "export=best", "+callbacks.")
    twins = ("policy=lookback", "mmeb_v2", "stage=warmup init", "resume=runs/A", "out=runs/mined2")
    is_long = any(words in command for words in long + twins)
    is_long |= any(REAL.match(word) for word in shlex.split(command))
    return pytest.param(command, id=command, marks=[pytest.mark.slow] * is_long)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", [marked(command) for command in HERE])
def test_a_command_runs(
    command: str, sandbox: Path, stand_ins: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)
    if not (sandbox / "runs" / "A").exists():
        run(shlex.split(FIRST), monkeypatch, stand_ins)
    if command in (FIRST, "python train.py"):
        return  # it has just run, in a folder with a name
    if words[0].startswith("PYTHONPATH="):
        monkeypatch.syspath_prepend(words.pop(0).partition("=")[2])
    if "model.source.path=NEW_MODEL" in words:
        write_new_model(sandbox / "NEW_MODEL", stand_ins["qwen2vl"])
    run(words, monkeypatch, stand_ins)


def write_new_model(folder: Path, stock: Path) -> None:
    """The stand-in as a model of the new family."""
    new = importlib.import_module("my_backbone")
    loaded = load(stock, kernel="sdpa", dtype="float32", gradient_checkpointing=False)
    values = {**loaded.backbone.stock.config.to_dict(), "model_type": "new_vl"}
    model = new.NewVLForConditionalGeneration(new.NewVLConfig.from_dict(values))
    model.load_state_dict(loaded.backbone.stock.state_dict())
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    loaded.image_processor.save_pretrained(folder)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch, stand_ins: dict[str, Path]) -> None:
    # The command line's last word on a key counts: a stand-in's folder goes behind the page's.
    words = [*words, *smaller(words, stand_ins)]
    if words[0] == "cocoa":
        assert cli.run(words[1:]) == 0
        return
    assert run_script(ROOT / words[1], words[2:], monkeypatch) == 0


def blocks() -> list[tuple[str, str]]:
    return [
        (page.stem, textwrap.dedent(code))
        for page in PAGES
        for code in PYTHON.findall(page.read_text())
        if "--8<--" not in code
    ]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block[0])
def test_python_runs(
    block: tuple[str, str],
    sandbox: Path,
    stand_ins: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not (sandbox / "runs" / "A").exists():
        run(shlex.split(FIRST), monkeypatch, stand_ins)
    if not (sandbox / "exported" / "st").exists():
        run(
            shlex.split("cocoa export runs/A --to sentence-transformers --out exported/st"),
            monkeypatch,
            stand_ins,
        )
    exec(block[1].replace("runs/<time>", "runs/A"), {})


def test_the_new_backbone_gives_the_stock_models_vectors(
    stand_ins: dict[str, Path],
    load_tiny: Callable[..., Loaded],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/examples/my_backbone.py on a folder of its family."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    new = importlib.import_module("my_backbone")
    FAMILIES["new_vl"] = new.NewVLBackbone  # also where it was imported before
    write_new_model(tmp_path, stand_ins["qwen2vl"])
    found = load_tiny(folder=new.NewVLSource(path=str(tmp_path)).folder(list))
    assert type(found.backbone) is new.NewVLBackbone
    stock = load_tiny(folder=stand_ins["qwen2vl"])
    processor = Processor(
        stock.tokenizer,
        stock.image_processor,
        max_length=64,
        min_pixels=784,
        max_pixels=4704,
        num_token_rows=stock.num_token_rows,
    )
    everyone = ("context", "bottleneck", "target")
    policy = Policy("all", everyone, everyone, everyone, causal=False)
    items = ["a dog", {"image": Image.radial_gradient("L").convert("RGB"), "text": "a cat"}]
    vectors = [Embedder(m.backbone, processor, policy).encode(items) for m in (stock, found)]
    np.testing.assert_allclose(*vectors, atol=1e-6)
