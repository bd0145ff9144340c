"""MMEB-V2's image annotations (instruction, text and image apart) in, MMEB-V1's columns out.

The annotations, `ziyjiang/MMEB_Test_Instruct`, hold for each row `qry_inst`, `qry_text`,
`qry_img_path`, `tgt_inst` and the lists `tgt_text`, `tgt_img_path`. How they become one string each
follows the benchmark's own harness, VLM2Vec (https://github.com/TIGER-AI-Lab/VLM2Vec,
src/data/eval_dataset/image_*.py), which goes to some length to give V1's strings again:

    query       <image> instruction text \\n       without an image where a text looks for images
    candidate   the bare text                      where texts are looked for
                <image> instruction \\n             where images are
                <image> instruction caption \\n     where images have captions

A candidate is known by a name, and every later candidate of the same name counts as the first one:
the text; the image's path (WebQA and EDIS: captions of one image collapse); path and caption (i2i).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pyarrow as pa
import pyarrow.compute as pc

from cocoa_pl.data.inputs import PLACEHOLDER


@dataclass(frozen=True)
class Reader:
    """How the rows of a meta-task are read.

    Args:
        query_image: the query holds an image.
        strips_instruction: of blanks on both sides; a line break then parts it from the image.
        query_end: behind the query.
        target_image: the candidates are images, with captions where the first one has one.
        target_end: behind a candidate without a caption; with one it is a line break.
        name_has_caption: candidates of one image are told apart by their captions.
    """

    query_image: bool
    strips_instruction: bool
    query_end: str
    target_image: bool
    target_end: str
    name_has_caption: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it needs; others may be missing or hold anything."""
        query_image = ("qry_img_path",) if self.query_image else ()
        target_image = ("tgt_inst", "tgt_img_path") if self.target_image else ()
        return ("qry_inst", "qry_text", *query_image, "tgt_text", *target_image)


def _finds_texts(*, strips_instruction: bool) -> Reader:
    return Reader(
        query_image=True,
        strips_instruction=strips_instruction,
        query_end="\n",
        target_image=False,
        target_end="",
        name_has_caption=False,
    )


def _finds_images_by_text(*, query_end: str) -> Reader:
    return Reader(
        query_image=False,
        strips_instruction=False,
        query_end=query_end,
        target_image=True,
        target_end="\n",
        name_has_caption=False,
    )


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "classification": _finds_texts(strips_instruction=False),
        "vqa": _finds_texts(strips_instruction=True),
        "i2t": _finds_texts(strips_instruction=False),
        "t2i": _finds_images_by_text(query_end="\n"),
        "dialogue_t2i": _finds_images_by_text(query_end="\n\n"),
        "i2i": Reader(
            query_image=True,
            strips_instruction=True,
            query_end="\n",
            target_image=True,
            target_end="",
            name_has_caption=True,
        ),
    }
)


def as_plain(batch: pa.RecordBatch, reader: Reader) -> tuple[pa.RecordBatch, pa.Array | None]:
    """V1's four columns, and the name of every candidate, flat; None if the text alone is the name.

    Args:
        batch: the reader's columns without nulls; a row's lists are of one length.
    """
    offsets = batch["tgt_text"].offsets
    targets, images, names = batch["tgt_text"].flatten(), None, None
    if reader.target_image:
        captions, images = targets, batch["tgt_img_path"].flatten()
        targets = _image_targets(batch, captions, reader)
        names = images
        if reader.name_has_caption:
            names = _join(images, ":", pc.utf8_trim(captions, characters='"'))
    else:
        images = pa.array([""] * len(targets), pa.string())
    return (
        pa.RecordBatch.from_arrays(
            [
                _queries(batch, reader),
                batch["qry_img_path"] if reader.query_image else pa.array([""] * len(batch)),
                pa.ListArray.from_arrays(_from_zero(offsets), _string(targets)),
                pa.ListArray.from_arrays(_from_zero(offsets), _string(images)),
            ],
            names=["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"],
        ),
        names,
    )


def _queries(batch: pa.RecordBatch, reader: Reader) -> pa.Array:
    instruction, text = _string(batch["qry_inst"]), _string(batch["qry_text"])
    if not reader.query_image:
        return _join(instruction, " ", text, reader.query_end)
    instruction = pc.replace_substring(instruction, PLACEHOLDER, "")
    if reader.strips_instruction:
        instruction = _join("\n", pc.utf8_trim_whitespace(instruction))
    prompt = pc.if_else(pc.equal(text, ""), instruction, _join(instruction, " ", text))
    return _join(_tight(_join(PLACEHOLDER, " ", prompt)), reader.query_end)


def _image_targets(batch: pa.RecordBatch, captions: pa.Array, reader: Reader) -> pa.Array:
    """The text beside each candidate image."""
    lists = batch["tgt_text"]
    no_captions = pa.scalar([""], lists.type)
    is_empty = pc.equal(pc.list_value_length(lists), 0)
    first = pc.list_element(pc.if_else(is_empty, no_captions, lists), 0)
    has_captions = pc.not_equal(pc.utf8_trim_whitespace(first), "")
    instruction = pc.replace_substring(_string(batch["tgt_inst"]), PLACEHOLDER, "")
    row = pc.list_parent_indices(lists)
    instruction, has_captions = instruction.take(row), has_captions.take(row)
    with_caption = _join(_tight(_join(PLACEHOLDER, " ", instruction, " ", captions)), "\n")
    alone = _join(_tight(_join(PLACEHOLDER, " ", instruction)), reader.target_end)
    return pc.if_else(has_captions, with_caption, alone)


def _join(*parts: pa.Array | str) -> pa.Array:
    strings = [part if isinstance(part, str) else _string(part) for part in parts]
    return pc.binary_join_element_wise(*strings, "")


def _tight(texts: pa.Array) -> pa.Array:
    """No blank in front of a line break, as in V1."""
    return pc.replace_substring(texts, " \n", "\n")


def _string(values: pa.Array) -> pa.Array:
    return values.cast(pa.string())


def _from_zero(offsets: pa.Array) -> pa.Array:
    """Offsets of a slice, counted from its own first value."""
    return pc.subtract(offsets, offsets[0]).cast(pa.int32())
