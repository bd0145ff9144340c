"""cocoa_pl: generative vision-language models into multimodal embedding models (CoCoA, arXiv
2603.01471).
"""

from typing import Any

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
