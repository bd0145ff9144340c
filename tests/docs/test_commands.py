"""The commands and the Python of the README and of docs/ are run as they stand there, on the
smallest model that works; small folders and models stand in for published ones. What needs several
machines, a GPU, hours or the hub is composed, with those of configs' headers and of help texts.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cocoa_pl import cli
from cocoa_pl.config.build import check_values
from cocoa_pl.config.command_line import compose_overrides
from cocoa_pl.embedder import Embedder
from cocoa_pl.models.loading import FAMILIES, Loaded, load
from tests.docs.pages import HERE, PAGES, PYTHON, ROOT, compositions, overrides
from tests.docs.published import write_models, write_published
from tests.files import noise, write_noise, write_rows
from tests.processes import run_script
from tests.small import SMALL_BENCHMARK, SMALL_DIGITS, SMALL_TRAINING, STAGES

# What others begin with.
FIRST = "python train.py hydra.run.dir=runs/A"
EXPORTED = "cocoa export runs/A --to sentence-transformers"


def test_most_commands_are_run() -> None:
    assert len(HERE) >= 25
    names = {command.split()[1] for command in HERE if command.startswith("cocoa")}
    assert names == set(cli.COMMANDS)
    assert {FIRST, EXPORTED} <= {*HERE}


@pytest.fixture(scope="module")
def sandbox(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: the examples, pictures, rows of one's own, a run."""
    folder = tmp_path_factory.mktemp("reader") / "sandbox"
    shutil.copytree(trained, folder)
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
    values = dict(word.split("=", 1) for word in words if "=" in word)
    if "resume" in values:
        return []  # it keeps its config
    real = next((m[1] or m[2] for word in words if (m := REAL.match(word))), None)
    own = "model.source._target_" in values
    has_digits = values.get("data", "digits") == "digits" and (own or real is None)
    benchmark = SMALL_BENCHMARK * (has_digits and "benchmark" not in values)
    training = SMALL_TRAINING
    if real is not None:
        training = list(SMALL_REAL)
        if not own:  # `qwen2vl_2b` of an experiment is `model=qwen2vl`
            training.append(f"model.source.path={stand_ins[real.removesuffix('_2b')]}")
        if not own and values.get("data") != "paper":
            training.append("data.validation_fraction=0.3")
    training = [*training, *SMALL_DIGITS * has_digits, *benchmark]
    of_a_command = {
        "train.py": training,
        "evaluate.py": benchmark,
        "mine": SMALL_DIGITS,
        "doctor": ["workers=0", *training],
    }
    return of_a_command.get(words[1], [])


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
    if command in (FIRST, "python train.py"):
        return  # it has run, in a folder with a name
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
    """As the page has it, and smaller."""
    # The command line's last word on a key counts: a stand-in's folder goes behind the page's.
    words = [*words, *smaller(words, stand_ins)]
    if words[0] == "cocoa":
        assert cli.run(words[1:]) == 0
        return
    assert run_script(ROOT / words[1], words[2:], monkeypatch) == 0


BLOCKS = [
    (page.stem, textwrap.dedent(code))
    for page in PAGES
    for code in PYTHON.findall(page.read_text())
    if "--8<--" not in code
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0])
def test_python_runs(
    block: tuple[str, str], sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (sandbox / "runs/A/sentence-transformers").exists():
        run(shlex.split(EXPORTED), monkeypatch, {})
    exec(block[1].replace("runs/<time>", "runs/A"), {})


def test_a_mapping_of_columns_reads_rows(tmp_path: Path) -> None:
    """The YAML of docs/data.md."""
    (mapping,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/own.yaml").write_text(mapping)
    for subset in ("charts", "pages"):
        rows = [
            {
                "question": f"what is {n}",
                "page": f"{n}.png",
                "answer": subset,
                "wrong_answers": ["x"],
            }
            for n in range(20)
        ]
        write_rows(tmp_path / subset / "train-0.parquet", rows)
    for number in range(20):
        write_noise(tmp_path / f"{number}.png", seed=number)
    words = ["--config-dir", str(tmp_path / "conf"), "data=own", f"data.root={tmp_path}"]
    small = ["workers=0", "evaluate=false", "stage=contrast", "stage.contrast.batch_size=8"]
    assert cli.run(["doctor", *words, *small, f"out={tmp_path / 'checkup'}"]) == 0


def test_the_new_backbone_gives_the_stock_models_vectors(
    tiny_folder: Path,
    loaded: Loaded,
    load_tiny: Callable[..., Loaded],
    embedder: Embedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/examples/my_backbone.py on a folder of its family."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    new = importlib.import_module("my_backbone")
    FAMILIES["new_vl"] = new.NewVLBackbone  # also where it was imported before
    write_new_model(tmp_path, tiny_folder)
    found = load_tiny(folder=new.NewVLSource(path=str(tmp_path)).folder(list))
    assert type(found.backbone) is new.NewVLBackbone
    items = ["a dog", {"image": noise((56, 28)), "text": "a cat"}]
    again = Embedder(found.backbone, embedder.processor, embedder.policy)
    np.testing.assert_allclose(again.encode(items), embedder.encode(items), atol=1e-6)


# --- What is not run composes ------------------------------------------------------------------

PLACES = [ROOT / "train.py", ROOT / "evaluate.py"]
for _place in ("conf/**/*.yaml", "docs/examples/**/*.yaml", "src/**/*.py"):
    PLACES += sorted(ROOT.glob(_place))


def not_run() -> list[Any]:
    """Those that are not run, and no longer one contains: of the pages; and, slow, of headers of
    configs and of help texts.
    """
    words = [shlex.split(command) for command in HERE if " -m " not in command]
    run = [overrides([w[1].removesuffix(".py"), *w[2:]]) for w in words]
    shown, others = compositions(PAGES), compositions(PLACES)
    longest = [one for one in shown + others if not any({*one} < {*o} for o in shown + others)]
    return [
        pytest.param(one, id=" ".join(one), marks=[pytest.mark.slow] * (one not in shown))
        for one in dict.fromkeys(longest)
        if one not in run
    ]


@pytest.mark.parametrize("command", not_run())
def test_a_command_composes(command: tuple[str, ...]) -> None:
    name, *words = command
    given = [word for word in words if word != "-m"]
    check_values(compose_overrides(name, [w.split(",")[0] if "-m" in words else w for w in given]))
