"""mteb's loaders through the encoder: every item, every image, and the right instruction."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mteb")

import mteb
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from PIL import Image

from cocoa_pl.attention import Policy
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.for_mteb.encoder import MMEB_TRAIN, CocoaEncoder

QUERY, DOCUMENT = PromptType.query, PromptType.document
WHERE = {"hf_split": "test", "hf_subset": "default"}


@pytest.fixture
def encoder(embedder: Embedder) -> CocoaEncoder:
    return CocoaEncoder(embedder, name="me/tiny", training_datasets=MMEB_TRAIN)


def task(**changes: Any) -> Any:
    described = {
        "name": "OKVQAIT2TRetrieval",  # one that mteb knows
        "type": "Any2AnyRetrieval",
        "modalities": ["image", "text"],
        "prompt": {"query": "find it"},
    }
    return SimpleNamespace(**{**described, **changes})


def test_items_are_those_of_the_embedder_in_the_loaders_order(
    encoder: CocoaEncoder, embedder: Embedder, make_image: Callable[..., Image.Image]
) -> None:
    pictures = [make_image((28, 28), seed=1), make_image((56, 28), seed=2)]
    batches = [
        {
            "id": ["a", "b"],
            "label": [1, 2],
            "text": ["a dog", "a cat"],
            "image": [pictures[0], None],
        },
        {"id": ["c", "d"], "text": ["", None], "image": [pictures[1], [pictures[0], pictures[1]]]},
        {"text": [""]},  # corpora hold such documents
    ]
    found = encoder.encode(batches, task_metadata=task(), prompt_type=QUERY, **WHERE)
    expected = embedder.encode(
        [
            {"text": "find it a dog", "image": pictures[0]},
            "find it a cat",
            {"text": "find it", "image": pictures[1]},
            {"text": "find it", "image": pictures},
            "find it  ",
        ]
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    without_image = embedder.encode(["find it a dog"])[0]  # which mteb's own wrapper would give
    assert np.abs(found[0] - without_image).max() > 1e-2


@pytest.mark.parametrize(
    ("instructions", "prompt", "side", "has_image", "expected"),
    [
        ({}, {"query": "find it"}, QUERY, True, "find it"),
        ({}, {"query": "find it", "document": "show it"}, DOCUMENT, True, "show it"),
        ({}, "find it", QUERY, False, "find it"),
        ({}, "find it", DOCUMENT, True, None),
        ({"query": "own"}, "find it", QUERY, True, "own"),
        ({"Any2AnyRetrieval": "type"}, "find it", QUERY, True, "type"),
        ({"Any2AnyRetrieval": "type"}, "find it", DOCUMENT, True, None),
        ({"Any2AnyRetrieval-document": "type"}, "find it", DOCUMENT, True, "type"),
        ({"OKVQAIT2TRetrieval": "name", "Any2AnyRetrieval": "type"}, "", QUERY, True, "name"),
        ({"OKVQAIT2TRetrieval-query": "side", "OKVQAIT2TRetrieval": "x"}, "", QUERY, True, "side"),
        ({"OKVQAIT2TRetrieval": ""}, "find it", QUERY, True, None),  # on purpose none
        ({}, "count them", None, True, "count them"),
        ({}, "count them", None, False, None),  # a label, unless all are texts
        ({}, None, QUERY, True, "Retrieve text based on user query."),  # mteb's, for its kind
    ],
)
def test_instructions(
    instructions: dict[str, str],
    prompt: Any,
    side: PromptType | None,
    has_image: bool,
    expected: str | None,
    embedder: Embedder,
) -> None:
    encoder = CocoaEncoder(embedder, name="me/tiny", instructions=instructions)
    assert encoder.instruction(task(prompt=prompt), side, has_image=has_image) == expected
    if (prompt, has_image) == ("count them", False):
        of_texts = task(modalities=["text"], prompt=prompt)
        assert encoder.instruction(of_texts, side, has_image=False) == prompt


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["a"], "audio": [b""]}, "hold audio, not only"),
        ({"text": ["a"], "second": [[Image.new("RGB", (28, 28))]]}, "hold second, not only"),
        ({"id": ["a"]}, "hold neither texts nor images"),
        ({"text": [None], "image": [None]}, "item 0: an item needs a text or an image"),
        ({"text": ["a", None], "image": [[], []]}, "item 1: an item needs a text or an image"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    batch: dict[str, Any], message: str, encoder: CocoaEncoder
) -> None:
    with pytest.raises(UserError, match=f"OKVQA.*{message}"):
        encoder.encode([batch], task_metadata=task(), **WHERE)
    with pytest.raises(UserError, match=r"OKVQA.* \(default, test\) holds no items"):
        encoder.encode([], task_metadata=task(), **WHERE)


def test_meta_is_that_of_mteb_and_its_revision_is_that_of_the_vectors(
    encoder: CocoaEncoder, embedder: Embedder, policies: dict[str, Policy]
) -> None:
    """mteb takes results of one name and revision for those of one model."""
    meta, stock = encoder.mteb_model_meta, embedder.backbone.stock
    assert isinstance(meta, ModelMeta)
    assert isinstance(encoder, EncoderProtocol)
    assert (meta.name, meta.max_tokens, meta.embed_dim) == ("me/tiny", 128, 32)
    assert meta.n_parameters == sum(p.numel() for p in stock.parameters())
    assert meta.n_embedding_parameters == 324 * 32
    assert meta.similarity_fn_name == ScoringFunction.COSINE
    assert meta.modalities == ["image", "text"]
    assert meta.training_datasets == set(MMEB_TRAIN)
    assert all(mteb.get_task(name).metadata.name == name for name in MMEB_TRAIN)

    causal = Embedder(embedder.backbone, embedder.processor, policies["causal"])
    same, of_others, instructed = (
        CocoaEncoder(one, name="me/tiny", instructions=given).mteb_model_meta.revision
        for one, given in ((embedder, {}), (causal, {}), (embedder, {"query": "Find it."}))
    )
    assert same == meta.revision
    assert len({same, of_others, instructed}) == 3
