"""A family of one's own: a stock class of transformers, wired to the project's attention."""

from functools import partial

from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from cocoa_pl.models.backbone import VisionInputs
from cocoa_pl.models.loading import FAMILIES, PretrainedSource
from cocoa_pl.models.qwen_vl import QwenVLBackbone, whole_images


# These two stand for what a new release of transformers brings.
class NewVLConfig(Qwen2VLConfig):
    model_type = "new_vl"


class NewVLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    config_class = NewVLConfig


AutoConfig.register("new_vl", NewVLConfig, exist_ok=True)
AutoModelForImageTextToText.register(NewVLConfig, NewVLForConditionalGeneration, exist_ok=True)


class NewVLBackbone(QwenVLBackbone):
    """What the vision tower is given differs between families: here, whole images."""

    @property
    def vision_inputs(self) -> VisionInputs:
        return partial(whole_images, merge_size=self.merge_size)


FAMILIES["new_vl"] = NewVLBackbone


class NewVLSource(PretrainedSource):
    """`model.source._target_` names it, which imports this file and so registers the family."""
