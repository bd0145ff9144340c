"""What all tests share: one compute thread each, GPU tests skipped where there is no GPU, and a
tiny model with samples for it: Qwen2-VL, or any family in the modules that run over all of them.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import tempfile

# Before torch is imported, and for the processes that tests start. Tests compute on small tensors,
# where threads cost more than they bring; one thread gives the same bits on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up on the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="cocoa_pl-tests-")

import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

from cocoa_pl.data.items import IMAGE_SLOT, Item
from tests.files import noise

# transformers takes seconds to import, so only the fixtures that need it do.
if TYPE_CHECKING:
    from cocoa_pl.attention import Policy
    from cocoa_pl.data.batch import Batch, Sample
    from cocoa_pl.data.processor import Processor
    from cocoa_pl.embedder import Embedder
    from cocoa_pl.models.loading import Loaded
    from cocoa_pl.models.tiny import TinySource

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

SENTENCE = "a red dog and the small cat sleep on one old sofa near two green boats"
IMAGE_SIZES = ((28, 28), (56, 28), (30, 90), (70, 60), (112, 56))  # width, height

# The twin of each family in conf/model, and what is smaller here than there.
TINY = {
    "qwen2_vl": ("tiny", "vision.embed_dim=32"),
    "qwen2_5_vl": ("tiny_qwen25vl", "vision.hidden_size=32", "vision.intermediate_size=64"),
    "qwen3_vl": (
        *("tiny_qwen3vl", "text.head_dim=8", "vision.hidden_size=32"),
        *("vision.intermediate_size=64", "vision.num_position_embeddings=16"),
        "vision.deepstack_visual_indexes=[0,1]",
    ),
}
TINY_SHARED = (
    *("vocabulary_size=320", "reserved_rows=4", "text.max_position_embeddings=256"),
    *("text.hidden_size=32", "text.intermediate_size=48", "text.num_hidden_layers=2"),
    *("text.rope_parameters.mrope_section=[2,1,1]", "vision.num_heads=2"),
    # At the usual 0.02 attention hardly moves anything.
    *("text.initializer_range=0.2", "vision.initializer_range=0.2"),
    *("image_mean=[0.5,0.4,0.3]", "image_std=[0.3,0.2,0.1]"),
)


# What takes a minute or more begins first, so that no process waits for it at the end.
LONG = (
    "tests/test_parallel_runs.py",
    "tests/docs/test_commands.py",
    "tests/docs/test_site.py",
    "tests/test_distributed.py",
    "tests/stages/test_recipe.py",
    "tests/stages/test_curves.py",
    "tests/test_commands.py",
    "tests/benchmarks/test_benchmarks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first. Without CUDA, `-m gpu` skips with a reason instead of failing one by
    one.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # its keywords hold names of folders too
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Millions of objects of imported modules stay: the garbage collector need not visit them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands set up logging for themselves."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `python train.py hydra.run.dir=runs/A` has run, once for all processes of
    pytest-xdist, on the smallest recipe; `out` and `err` hold what it wrote.
    """
    from tests.small import SMALL_BENCHMARK, SMALL_DIGITS, SMALL_TRAINING

    base, script = tmp_path_factory.getbasetemp(), Path(__file__).parents[1] / "train.py"
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            words = [*SMALL_TRAINING, *SMALL_DIGITS, *SMALL_BENCHMARK, "hydra.run.dir=runs/A"]
            with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
                command = [sys.executable, str(script), *words]
                subprocess.run(command, cwd=folder, stdout=out, stderr=err, check=True)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """What the tiny tokenizer is trained on."""
    return [SENTENCE, "the cat and the dog sleep near one red sofa", "two boats"]


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> str:
    """The family of the tiny model; a module runs over all of them with `EVERY_FAMILY`."""
    name: str = getattr(request, "param", "qwen2_vl")
    return name


@pytest.fixture(scope="session")
def token_side(family: str) -> int:
    """Pixels of the side of one visual token."""
    return 32 if family == "qwen3_vl" else 28


@pytest.fixture(scope="session")
def make_source(
    tmp_path_factory: pytest.TempPathFactory, family: str, token_side: int
) -> Callable[..., TinySource]:
    """A `TinySource` far smaller than `model=tiny`; `text` fields can be replaced."""
    from cocoa_pl.config.build import build
    from tests.configs import composed

    cache_dir = tmp_path_factory.mktemp("tiny")
    twin, *smaller = TINY[family]

    def make(*, seed: int = 0, cache_dir: Path = cache_dir, **text: Any) -> TinySource:
        changed = [*TINY_SHARED, *smaller, *(f"text.{key}={value}" for key, value in text.items())]
        cfg = composed(
            *(f"model={twin}", f"model.max_pixels={6 * token_side**2}"),
            *(f"cache_dir={cache_dir}", f"seed={seed}"),
            *(f"model.source.{override}" for override in changed),
        )
        source: TinySource = build(cfg.model.source)
        return source

    return make


@pytest.fixture(scope="session")
def tiny_folder(make_source: Callable[..., TinySource], texts: list[str]) -> Path:
    """The folder of a model of two layers."""
    return make_source().folder(lambda: texts)


@pytest.fixture(scope="session")
def untied_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a vocabulary head of its own, as all published ones of 7B and 8B have."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("untied") / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    (embedding,) = (value for name, value in weights.items() if "embed_tokens" in name)
    weights["lm_head.weight"] = embedding + 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def headless_folder(untied_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without it, as models that only embed are published."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(untied_folder, tmp_path_factory.mktemp("headless") / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def load_tiny(tiny_folder: Path) -> Callable[..., Loaded]:
    """Loads a tiny model of its own, for tests that change it."""
    from cocoa_pl.models.loading import load

    def load_one(
        *, folder: Path = tiny_folder, dtype: str = "float32", gradient_checkpointing: bool = False
    ) -> Loaded:
        loaded = load(
            folder, kernel="sdpa", dtype=dtype, gradient_checkpointing=gradient_checkpointing
        )
        loaded.backbone.eval()
        return loaded

    return load_one


@pytest.fixture(scope="session")
def loaded(load_tiny: Callable[..., Loaded]) -> Loaded:
    """The tiny model in float32, for tests that only read it."""
    return load_tiny()


@pytest.fixture(scope="session")
def make_processor(loaded: Loaded, token_side: int) -> Callable[..., Processor]:
    """A `Processor` of the tiny model, with other limits where a test asks for them."""
    from cocoa_pl.data.processor import Processor

    def make(*, max_length: int = 128, max_pixels: int = 6 * token_side**2) -> Processor:
        return Processor(
            loaded.tokenizer,
            loaded.image_processor,
            max_length=max_length,
            min_pixels=token_side**2,
            max_pixels=max_pixels,
            num_token_rows=loaded.num_token_rows,
        )

    return make


@pytest.fixture(scope="session")
def processor(make_processor: Callable[..., Processor]) -> Processor:
    return make_processor()


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    return noise


@pytest.fixture(scope="session")
def make_item(make_image: Callable[..., Image.Image]) -> Callable[..., Item]:
    """A random text with some images of different sizes anywhere in it."""

    def make(seed: int, *, images: int = 0) -> Item:
        rng = random.Random(seed)
        words = rng.choices(SENTENCE.split(), k=rng.randint(2, 9))
        for _ in range(images):
            words.insert(rng.randint(0, len(words)), IMAGE_SLOT)
        pictures = [
            make_image(rng.choice(IMAGE_SIZES), seed=rng.getrandbits(32)) for _ in range(images)
        ]
        return Item(" ".join(words), tuple(pictures))

    return make


@pytest.fixture(scope="session")
def make_samples(
    processor: Processor, make_item: Callable[..., Item]
) -> Callable[..., list[Sample]]:
    """One sample for each number of images, every second one with a TARGET where asked for."""

    def make(images: Sequence[int], *, targets: bool = False, seed: int = 0) -> list[Sample]:
        samples = []
        for rank, count in enumerate(images):
            sample_seed = 1000 * seed + rank
            item = make_item(sample_seed, images=count)
            target = make_item(sample_seed + 500).text if targets and rank % 2 == 0 else None
            samples.append(processor(item, target, key=item.key, row_id=f"toy row {rank}"))
        return samples

    return make


@pytest.fixture(scope="session")
def policies() -> dict[str, Policy]:
    """The attention policies of conf/attention, by name."""
    from tests.attention.oracle import OURS

    return OURS


@pytest.fixture(scope="session")
def embedder(loaded: Loaded, processor: Processor, policies: dict[str, Policy]) -> Embedder:
    """Of the tiny model with bidirectional attention, for tests that only read it."""
    from cocoa_pl.embedder import Embedder

    return Embedder(loaded.backbone, processor, policies["bidirectional"])


@pytest.fixture(scope="session")
def packed(loaded: Loaded, policies: dict[str, Policy]) -> Callable[..., Batch]:
    """Samples as a batch of the tiny model, planned for a policy by its name."""
    from cocoa_pl.data.batch import pack

    def make(samples: Sequence[Sample], policy: str = "bidirectional") -> Batch:
        return pack(samples, loaded.backbone.planner(policies[policy]))

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; pages of this project have to work in a real one."""
    selenium = pytest.importorskip("selenium.webdriver")
    driver, program = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or program is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(executable_path=driver)
    wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait

    class Chromium(selenium.Chrome):  # type: ignore[misc, name-defined]
        """`get` returns when the page is whole: the driver's own may return while it is read."""

        def get(self, url: str) -> None:
            self.execute_script("window.left = true")
            super().get(url)
            loaded = "return !window.left && document.readyState === 'complete'"
            wait(self, 60).until(lambda _: self.execute_script(loaded))

    chromium = Chromium(options=options, service=service)
    yield chromium
    chromium.quit()
