"""One optimizer step of a stage on tensors without values: the modules, samples, optimizer and
autograd of training, under torch's FakeTensorMode.

Nothing here knows a family, a stage or a loss. Tensors say that they are on the CPU, so that a plan
is the same on any machine and takes nothing of a GPU; what a GPU would do otherwise is put in its
place (`as_on_gpu`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForImageTextToText, PretrainedConfig

from cocoa_pl.attention import TEXT_ATTENTION, kernels
from cocoa_pl.data.batch import Batch
from cocoa_pl.data.datamodule import samples_of
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import mix
from cocoa_pl.errors import UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import DTYPES, family_of, save_memory
from cocoa_pl.planning.counting import HOST_VALUES, Count, Counting
from cocoa_pl.planning.repeats import FakeCounting, repeated
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.recipe import Stage

MOST_SKIPPED = 100  # of assumed rows, for one that a stage uses
WEIGHTS, GRADIENTS, OPTIMIZER, BATCH = "weights", "gradients", "optimizer state", "batch"


@dataclass(frozen=True)
class Lengths:
    """What a row of the training data is taken to look like; the same for all rows.

    Args:
        text: text tokens on each side of a pair.
        images_per_query, images_per_positive: may be fractions; then some rows have one more.
        negatives: hard negatives of a row, each like a positive.
        image_tokens: visual tokens of an image, as far as `max_pixels` of the model allows; None
            for the largest square.
    """

    text: int
    images_per_query: float
    images_per_positive: float
    negatives: int
    image_tokens: int | None

    def pair(self, row: int, image: Image.Image) -> Pair:
        """A row whose words are one token each."""

        def item(images: float) -> Item:
            # Fractions spread evenly: of 0.25 every fourth row has an image.
            count = math.floor((row + 1) * images) - math.floor(row * images)
            return Item(" ".join([IMAGE_SLOT] * count + ["word"] * self.text), (image,) * count)

        positive = item(self.images_per_positive)
        return Pair(
            query=item(self.images_per_query),
            positive=positive,
            negatives=(positive,) * self.negatives,
            subset="assumed",
            row_id=f"assumed row {row}",
        )

    def image(self, processor: Processor) -> Image.Image:
        """A blank picture of that many visual tokens, the least elongated one."""
        side = processor.patch_size * processor.merge_size  # of a visual token, in pixels
        height = width = max(1, math.isqrt(processor.max_pixels) // side)
        if (count := self.image_tokens) is not None:
            height = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
            width = count // height
        return Image.new("RGB", (width * side, height * side))


class Words:
    """A tokenizer of one token a word, for models whose files are not here."""

    eos_token_id = 0

    def __len__(self) -> int:
        return 1

    def __call__(self, text: str, **_: object) -> Any:
        return SimpleNamespace(input_ids=[0] * len(text.split()))

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0


def open_model(
    config: PretrainedConfig,
    adapter: Callable[[Backbone], Backbone],
    *,
    kernel: str,
    dtype: str,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool,
    **sizes: int,
) -> tuple[Backbone, Processor, int]:
    """The backbone and processor of training, without weights: on torch's `meta` device; and how
    many parameters the model has without adapters.

    Args:
        sizes: `max_length`, `min_pixels` and `max_pixels` of the processor.
    """
    family, vision = family_of(config, where="this"), config.vision_config
    images = family.image_processor(
        patch_size=vision.patch_size, merge_size=vision.spatial_merge_size
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=DTYPES[dtype], attn_implementation=TEXT_ATTENTION
        )
        if gradient_checkpointing:
            save_memory(model)
        backbone = family(model, images, kernel=kernel)
        own = sum(p.numel() for p in backbone.parameters())
        backbone = adapter(backbone)
    backbone.compute_dtype = compute_dtype
    rows = config.get_text_config().vocab_size
    return backbone, Processor(Words(), images, num_token_rows=rows, **sizes), own


def make_step(
    stage: Stage, backbone: Backbone, processor: Processor, lengths: Lengths, *, rows: int
) -> tuple[StageModule, list[Batch]]:
    """The stage's module, and what a data worker makes of a step's rows for it.

    Raises:
        UserError: for lengths of which the stage can use no rows.
    """
    with torch.device("meta"):
        module = stage.make_module(backbone, processor, steps=1, seed=0)
    image = lengths.image(processor)
    assumed = (lengths.pair(row, image) for row in range(MOST_SKIPPED * rows))
    usable = (
        pair
        for pair in assumed
        if not (stage.describing and pair.query.media and pair.positive.media)  # as in training
    )
    pairs = list(islice(usable, rows))
    if len(pairs) < rows:
        raise UserError(
            f"stage {stage.name} describes images, and of the assumed rows too many have some on "
            "both sides; lower lengths.images_per_positive"
        )
    made = [
        samples_of(
            pair,
            mix(0, row),
            make_samples=stage.make_samples,
            processor=processor,
            masking=module.masking,
            on_bad_row="fail",
        )
        for row, pair in enumerate(pairs)
    ]
    return module, module.collator(validating=False)(made)


@dataclass(frozen=True)
class Step:
    """What a step does and holds on one device.

    Attributes:
        memory: bytes by kind at the fullest moment; the optimizer's state is there from the second
            step on.
        working: the most bytes that ACTIVATIONS and BATCH ever were, whatever else was there.
    """

    count: Count
    memory: dict[str, int]
    working: int


def run_step(
    module: StageModule,
    batches: Sequence[Batch],
    *,
    weights: torch.dtype | None = None,
    repeats: bool = True,
) -> Step:
    """Run a step of a module that is on the `meta` device, whose tensors it replaces.

    Args:
        weights: the type in which FSDP2 gathers them; None for their own.
        repeats: of the backbone's blocks, run each kind of call once, and count it as often as it
            is made. False runs them all: the same, for eight times the work (2B, counted).
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _without_values(module, fake, weights)
    module._device = torch.device("cpu")
    module.manual_backward = torch.autograd.backward  # type: ignore[assignment, method-assign]
    counting = FakeCounting()
    with ExitStack() as stack:
        # The gradient cache would ask a GPU for its generator.
        stack.enter_context(patch.object(torch.cuda, "is_available", lambda: False))
        stack.enter_context(patch.object(kernels, "_log_choice", lambda *_: None))
        stack.enter_context(_ToDevice(fake, counting))
        stack.enter_context(fake)
        stack.enter_context(counting)
        counting.hold(chain(module.parameters(), module.buffers()), WEIGHTS)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: counting.hold([p.grad], GRADIENTS)
                )
        [optimizer], _ = module.configure_optimizers()
        with repeated(module.backbone, counting) if repeats else ExitStack():
            module.gradients(batches)
        memory, working = dict(counting.at_peak), counting.highest
        optimizer.step()
        state = chain.from_iterable(one.values() for one in optimizer.state.values())
        memory[OPTIMIZER] = sum(value.nbytes for value in state)
        module.zero_grad()
    return Step(counting.result, memory, working + memory.get(BATCH, 0))


def _without_values(module: nn.Module, fake: FakeTensorMode, dtype: torch.dtype | None) -> None:
    """Replace parameters and buffers by fake ones; what was tied stays tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, whose id it keeps taken
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in made:
                    with fake:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        if isinstance(old, nn.Parameter):
                            new = new.to(dtype or old.dtype)
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = new, old
                if old is not None:
                    tensors[name] = made[id(old)][0]  # type: ignore[assignment]


class _ToDevice(TorchFunctionMode):
    """What a step moves to the device loses its values, and is there from then on."""

    def __init__(self, fake: FakeTensorMode, counting: Counting) -> None:
        super().__init__()
        self.fake, self.counting = fake, counting

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is not Tensor.to or isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        moved = self.fake.from_tensor(args[0])
        if moved.dtype in (torch.int32, torch.int64):
            setattr(moved, HOST_VALUES, args[0].numpy())
        self.counting.hold([moved], BATCH)
        return moved


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Compute as a GPU that has flash attention, as all in conf/hardware do: where it is asked
    which kernel attends, and where the CPU would drop out and normalise in another way.
    """
    refusal, layer_norm = kernels.flash_refusal, functional.layer_norm

    def of_gpu(_: torch.device, *rest: Any) -> str | None:
        return refusal(torch.device("cuda"), *rest)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        # One kernel, which keeps a byte of mask for each value.
        return torch.native_dropout(x, p, training)[0] if training and p else x

    def wide_layer_norm(x: Tensor, shape: Any, *affine: Any, **named: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(x, shape, *affine, **named)
        with torch.autocast("cpu", enabled=False):  # CUDA's autocast takes it in float32
            return layer_norm(
                x.float(), shape, *tree_map_only(Tensor, Tensor.float, affine), **named
            )

    with (
        patch.object(kernels, "flash_refusal", of_gpu),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)),
        patch.dict(kernels.KERNELS, flash=kernels.varlen),  # the same kernel, of another package
        patch.object(functional, "dropout", dropout),
        patch.object(functional, "layer_norm", wide_layer_norm),
    ):
        yield
