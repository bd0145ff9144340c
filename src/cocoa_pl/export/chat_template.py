"""What stands where in a model's input, as the Jinja template that transformers,
sentence-transformers and vLLM render messages with.

    image1 image2 newline instruction blank text

Images come first in whatever order a message lists its parts; a system message is the instruction.
It is the input that `Embedder` builds: `data/inputs.py` says the same in Python. EOS is not in it:
the tokenizer appends it, behind what is left of a text that had to be cut.
"""

from collections.abc import Sequence
from importlib.resources import files

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def chat_template(special_tokens: Sequence[str]) -> str:
    """The template.

    Args:
        special_tokens: what a user's text must not be obeyed for: a blank of no width goes into it.
    """
    template = (files("cocoa_pl.export") / "chat_template.j2").read_text()
    return template.strip().replace("IMAGE", IMAGE).replace("TOKENS", str(list(special_tokens)))
