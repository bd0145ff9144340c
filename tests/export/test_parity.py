"""An exported folder gives the trained model's vectors in other tools, or is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from transformers import AutoProcessor

from cocoa_pl.attention import Policy
from cocoa_pl.data.images import open_image
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.export.folder import export, write_sentence_transformers
from cocoa_pl.export.parity import Compared, check, compare, images_only
from cocoa_pl.models.exported import described_in, write_description
from cocoa_pl.models.loading import Loaded

ALL = ("context", "bottleneck", "target")
LoadTiny = Callable[..., Loaded]


@pytest.fixture(scope="module")
def folder(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the files of sentence-transformers."""
    place = tmp_path_factory.mktemp("exported") / "model"
    export(embedder, place, lineage=[])
    write_sentence_transformers(place, dim=embedder.dim)
    return place


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """A copy to be tampered with."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def sentences(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    with images_only():
        return SentenceTransformer(str(folder), device="cpu")


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def differences(found: list[Compared]) -> dict[str, float | None]:
    return {one.way: one.difference for one in found}


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("qwen2_vl", "causal"),
        ("qwen3_vl", "bidirectional"),
        pytest.param("qwen2_5_vl", "bidirectional", marks=pytest.mark.slow),
    ],
    indirect=["family"],
    scope="session",
)
def test_every_tool_reads_the_trained_vectors(
    policy: str, loaded: Loaded, processor: Processor, policies: dict[str, Policy], tmp_path: Path
) -> None:
    trained = Embedder(loaded.backbone, processor, policies[policy])
    export(trained, tmp_path / "model", lineage=[])
    write_sentence_transformers(tmp_path / "model", dim=trained.dim)
    found = differences(compare(trained, tmp_path / "model", with_sentence_transformers=True))
    assert set(found) == {"Embedder", "transformers", "sentence-transformers"}
    assert all(difference is not None and difference < 1e-5 for difference in found.values())


def causal_again(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rewrite(folder / "config.json", text_config={**text, "is_causal": True})


def no_end_token(folder: Path) -> None:
    rewrite(folder / "tokenizer.json", post_processor=None)


@pytest.mark.parametrize("spoil", [causal_again, no_end_token])
def test_what_would_be_read_wrongly_is_found(
    spoil: Callable[[Path], None], embedder: Embedder, changed: Path
) -> None:
    spoil(changed)
    write_description(changed, described_in(changed))  # as if it had been exported like this
    found = compare(embedder, changed, with_sentence_transformers=True)
    for way in ("transformers", "sentence-transformers"):
        difference = differences(found)[way]
        assert difference is not None
        assert difference > 1e-3
    with pytest.raises(UserError, match=r"does not give the trained model's vectors"):
        check(found)


def test_attention_that_no_other_tool_knows_is_refused(
    loaded: Loaded, processor: Processor, tmp_path: Path
) -> None:
    lookback = Policy("lookback", ("context",), ALL, ALL, causal=False)
    trained = Embedder(loaded.backbone, processor, lookback)
    export(trained, tmp_path / "model", lineage=[])
    found = compare(trained, tmp_path / "model", with_sentence_transformers=False)
    assert differences(found)["Embedder"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match=r"^transformers does not give"):
        check(found)


def test_nan_is_refused() -> None:
    with pytest.raises(UserError, match="transformers does not give"):
        check([Compared("transformers", float("nan"))])
    check([Compared("sentence-transformers", None, "not installed"), Compared("Embedder", 0.0)])


# --- What sentence-transformers is known to get wrong ---


def assert_same(sentences: Any, embedder: Embedder, items: list[Any], **options: Any) -> None:
    expected = embedder.encode(items, instruction=options.get("prompt"))
    found: NDArray[np.float32] = sentences.encode(items, **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def picture(make_image: Callable[..., Image.Image]) -> Image.Image:
    return make_image((70, 60), seed=5)


def test_a_prompt_stands_between_image_and_text(
    sentences: Any, embedder: Embedder, picture: Image.Image
) -> None:
    words = ["a dog", "  a dog \n", "\n"]
    items = [*words, picture, *({"text": text, "image": picture} for text in ["", *words])]
    items.append({"image": picture, "text": "a dog"})  # in any order of keys
    for prompt in ("Find a picture:", "Find a picture: ", "Find\n", "Find\u3000", ""):
        assert_same(sentences, embedder, items, prompt=prompt)


def test_placeholders_are_placed_and_refused_alike(
    sentences: Any, embedder: Embedder, picture: Image.Image, make_image: Callable[..., Image.Image]
) -> None:
    pictures = [picture, make_image((30, 90), seed=6)]
    items = [
        {"text": "is <|image_1|> like <|image_2|>?", "image": pictures},
        {"text": "left <image>, right <image>", "image": pictures},
        {"text": "<|image_1|>\nfind it", "image": picture},
        {"text": "an <image> in HTML"},
        {"text": "an \ufffc in a text", "image": picture},
    ]
    assert_same(sentences, embedder, items)
    assert_same(sentences, embedder, items, prompt="Find it:")
    for text in ("<|image_2|>", "<|image_1|> <image>", "<|image_1|> <|image_1|>", "\ufdd0"):
        item = {"text": text, "image": picture}
        with pytest.raises(UserError) as ours:
            embedder.encode([item])
        with pytest.raises(Exception, match=re.escape(ours.value.message)):
            sentences.encode([item])


def test_odd_pictures_are_read_alike_once_open_image_has_read_them(
    sentences: Any, embedder: Embedder
) -> None:
    ramp = np.linspace(0, 1, 60 * 90).reshape(60, 90)
    colours = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2)
    turned = Image.Exif()
    turned[Base.Orientation] = 6
    for pixels, options in (
        ((ramp * 65535).astype(np.uint16), {}),  # 16-bit grey
        ((colours * 255).astype(np.uint8), {"exif": turned}),
        ((np.dstack([colours, ramp]) * 255).astype(np.uint8), {}),  # transparent
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", **options)
        expected = embedder.encode([buffer.getvalue()])
        found = sentences.encode([open_image(buffer.getvalue())])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_shorter_vectors_are_alike_where_the_card_says_how(
    sentences: Any, embedder: Embedder
) -> None:
    expected = embedder.encode(["a dog"], truncate_dim=16)
    found = sentences.encode(["a dog"], truncate_dim=16, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_end_token_survives_cutting_beside_an_image(
    sentences: Any, embedder: Embedder, picture: Image.Image
) -> None:
    long = "a cat and a dog " * embedder.processor.max_length
    assert_same(sentences, embedder, [{"image": picture, "text": long}, long])
    ids = sentences.preprocess([{"image": picture, "text": long}])["input_ids"][0]
    assert len(ids) == embedder.processor.max_length
    assert ids[-1] == embedder.processor.eos_id


def test_what_no_tower_sees_is_refused(folder: Path) -> None:
    with images_only():
        processor = AutoProcessor.from_pretrained(folder)
    video = [{"role": "user", "content": [{"type": "video", "video": "film.mp4"}]}]
    with pytest.raises(Exception, match="texts and images can be embedded, not video"):
        processor.apply_chat_template(video, tokenize=False)


@pytest.mark.skipif(
    find_spec("torchvision") is not None, reason="nothing is changed where torchvision is installed"
)
def test_without_torchvision_upstream_refuses_and_images_only_does_not(folder: Path) -> None:
    with pytest.raises(ImportError):
        AutoProcessor.from_pretrained(folder)
    with images_only():
        AutoProcessor.from_pretrained(folder)
    with pytest.raises(ImportError):
        AutoProcessor.from_pretrained(folder)
