"""Hooks of mkdocs: pictures for the pages, drawn by the code that they are about, and links to
files of the repository that are no pages.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib import pyplot as plt
from mkdocs.structure.files import File, Files
from PIL import Image

from cocoa_pl.attention import Policy, dense_mask, segment_letters, self_plan
from cocoa_pl.attention.command import draw_grid
from cocoa_pl.config.command_line import compose_overrides
from cocoa_pl.data.batch import pack
from cocoa_pl.data.digit_scenes import caption, compose, draw
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.masking import Masking, hidden_patches
from cocoa_pl.run import make_processors, open_model
from cocoa_pl.stages.callbacks import image_triptychs

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = (5, 1, 4)  # CONTEXT, BOTTLENECK, TARGET in the pictures of attention
LAYOUTS = ((7, 2, 0, 4), (3, 8, 8, 1), (9, 0, 5, 6))


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures to what is built."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in pictures(Path(scratch)):
            uri = f"img/drawn/{path.name}"
            files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ lead nowhere on a site: their text is the path in the repository."""
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)\)", r"`\2`", markdown)


def pictures(folder: Path) -> Iterable[Path]:
    """Draw all of them."""
    for path in sorted((ROOT / "conf" / "attention").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        del values["_target_"]
        policy = Policy(**values)
        mask = dense_mask(policy, torch.tensor([EXAMPLE]))
        letters = segment_letters(EXAMPLE)
        drawn = folder / f"{path.stem}.png"
        draw_grid(drawn, mask, letters, segment_lengths=EXAMPLE, title=policy.name)
        yield drawn
    yield draw_masking(folder / "masking.png", folder)


def draw_masking(path: Path, folder: Path) -> Path:
    """Digit scenes as they are, and beside it as warm-up shows them: hidden patches as noise."""
    random = np.random.default_rng(0)
    scenes = [compose(layout, split="train", rng=random) for layout in LAYOUTS]
    captions = [caption(scene.layout) for scene in scenes]
    cfg = compose_overrides("train", [f"cache_dir={folder}"])
    loaded = open_model(cfg, lambda: captions)
    processor, _ = make_processors(cfg, loaded)
    hides = cfg.stage.warmup.module
    masking = Masking(
        text_ratio=hides.text_ratio,
        text_segment=hides.text_segment,
        patch_ratio=hides.patch_ratio,
        mask_token_id=processor.mask_id,
    )
    samples = []
    for number, (scene, text) in enumerate(zip(scenes, captions, strict=True)):
        item = Item(f"{IMAGE_SLOT}{text}", (Image.fromarray(draw(scene)).convert("RGB"),))
        samples.append(masking(processor(item, None, key=number, row_id=text), random))
    batch = pack(samples, lambda lengths, _: (self_plan(lengths.sum(1)), {}))
    hidden = hidden_patches(batch, processor.merge_size)
    rebuilt = loaded.backbone.pixels(batch)[hidden]
    shown = image_triptychs(loaded.backbone, batch, rebuilt)
    without_rebuilt = shown[:, : shown.shape[1] * 2 // 3]
    plt.imsave(path, without_rebuilt.repeat(3, axis=0).repeat(3, axis=1))
    return path
