"""The files that make `SentenceTransformer(folder)` read an exported folder: three stock modules,
no code of this project.

Layout of sentence-transformers 6 (https://sbert.net): the stock Transformer module renders messages
with the folder's chat template, Pooling takes the last token, which is EOS, Normalize makes unit
vectors.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}

MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)
WRITTEN_FOR = "6.0.0"  # the oldest release whose modules lie at these places


def write_sentence_transformers(folder: Path, *, dim: int) -> None:
    """Make a folder that `export` wrote one of sentence-transformers, too.

    Args:
        dim: components of a vector.
    """
    try:
        release = version("sentence-transformers")  # which parity is checked with
    except PackageNotFoundError:
        release = WRITTEN_FOR
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(MODULES)
    ]
    for path, _ in MODULES[1:]:
        (folder / path).mkdir()
    files: dict[str, Any] = {
        "modules.json": modules,
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": release},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": _FORWARD,
                "image": _FORWARD,
                "message": {**_FORWARD, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
            # PIL's exact pixels: torchvision's resizing rounds differently, vectors by up to 2e-3.
            # The newer name, backend, is refused by the video processor that loads beside it.
            "processor_kwargs": {"use_fast": False},
            "unpad_inputs": False,  # flattened texts would see each other's neighbours
        },
        "1_Pooling/config.json": {
            "embedding_dimension": dim,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
