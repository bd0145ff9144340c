"""What stands where in a model's input, as the Jinja template that transformers,
sentence-transformers and vLLM render messages with.

    image1 image2 newline instruction blank text

Images come first in whatever order a message lists its parts, or where placeholders in the text
stand; a system message is the instruction. It is the template that `Embedder` and the readers of
rows use themselves (`data/inputs.py`), with the model's own image token. EOS is not in it: the
tokenizer appends it, behind what is left of a text that had to be cut.
"""

from collections.abc import Sequence

from cocoa_pl.data.items import template_source

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def chat_template(special_tokens: Sequence[str]) -> str:
    """The template.

    Args:
        special_tokens: what a user's text must not be obeyed for: a blank of no width goes into it.
    """
    return template_source(image=IMAGE, special_tokens=special_tokens)
