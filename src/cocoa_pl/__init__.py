"""cocoa_pl: generative vision-language models into multimodal embedding models (CoCoA, arXiv
2603.01471).
"""

import os
from typing import Any

# OpenMP's threads spin for a while where they wait for each other. On a core that another process
# has taken too, that keeps the very thread from running that they wait for (docs/speed.md). libgomp
# reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["Embedder", "open_image"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when the embedder is asked for."""
    if name == "Embedder":
        from cocoa_pl.embedder import Embedder

        return Embedder
    if name == "open_image":
        from cocoa_pl.data.images import open_image

        return open_image
    raise AttributeError(name)
