"""A studio and sizes in, the subsets of the embedded data set out: who asks about which scenes."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from cocoa_pl.data import digit_tasks as tasks
from cocoa_pl.data.digit_tasks import Drawn, Example, Side, Task
from cocoa_pl.data.digit_writer import Studio
from cocoa_pl.data.scenes import (
    Layout,
    filled,
    held_out_layouts,
    layouts,
    ring_layouts,
)
from cocoa_pl.errors import UserError

# Subset -> task group, in the order of reports.
IN_DISTRIBUTION = {
    "scene_i2t": "retrieval",
    "scene_t2i": "retrieval",
    "scene_i2i": "retrieval",
    "scene_it2i": "retrieval",
    "position_cls": "classification",
    "count_vqa": "vqa",
    "right_of_vqa": "vqa",
    "grounding": "grounding",
}
OUT_OF_DISTRIBUTION = {
    "grid3_i2t": "retrieval",
    "grid3_t2i": "retrieval",
    "inverted_i2t": "retrieval",
    "inverted_cls": "classification",
    "heldout_i2t": "retrieval",
    "heldout_t2i": "retrieval",
    "heldout_vqa": "vqa",
}
GROUP_OF = IN_DISTRIBUTION | OUT_OF_DISTRIBUTION

_T = TypeVar("_T")


def training_examples(studio: Studio, *, scenes: int, task_rows: int) -> dict[str, list[Example]]:
    """Rows of each subset; with more scenes than layouts, layouts repeat in new handwriting."""
    known = layouts("train")
    repeated = [known[number % len(known)] for number in range(scenes)]
    drawn = studio.draw(studio.compose(repeated), name="scene")
    asked = _shuffled(drawn, studio)[:task_rows]
    cells = tasks.cells_to_find(asked, rng=studio.rng)
    crops = [{cell: studio.crop(one, cell=cell)} for one, cell in zip(asked, cells, strict=True)]
    return _examples(studio, drawn, rows=task_rows) | {
        "grounding": tasks.grounding(asked, cells, crops, rng=studio.rng)
    }


def evaluation_tasks(studio: Studio, *, scenes: int, task_rows: int) -> list[Task]:
    """The in-distribution subsets with their candidates; every scene has a layout of its own."""
    drawn = studio.draw(
        studio.compose(_first(layouts(studio.split), scenes, what="scenes")), name="scene"
    )
    asked = _shuffled(drawn, studio)[:task_rows]
    cells = tasks.cells_to_find(asked, rng=studio.rng)
    crops = [
        {cell: studio.crop(one, cell=cell) for cell in filled(one.scene.layout)} for one in asked
    ]
    pool, candidates = tasks.against_crops(asked, cells, crops)
    given_pools = {
        "scene_it2i": [tasks.target(one.image) for one in drawn],
        "position_cls": tasks.digit_names(),
        "count_vqa": tasks.answers(),
        "right_of_vqa": tasks.answers(),
    }
    grounding = tasks.grounding(asked, cells, crops, rng=studio.rng)
    return [
        *(
            _task(name, examples, pool=given_pools.get(name))
            for name, examples in _examples(studio, drawn, rows=task_rows).items()
        ),
        Task("grounding", grounding, pool, candidates),
    ]


def out_of_distribution_tasks(studio: Studio, *, rows: int) -> list[Task]:
    """3 x 3 grids, light ink on dark paper, and pairs of neighbours that training never shows."""
    ring = studio.draw(studio.compose(ring_layouts(studio.rng, count=rows)), name="grid3")
    normal = _first(layouts(studio.split), rows, what="task_rows")
    inverted = studio.draw(studio.compose(normal), name="inverted", inverted=True)
    held_out = studio.draw(
        studio.compose(_first(held_out_layouts(), rows, what="task_rows")), name="heldout"
    )
    neighbours = tasks.right_of(held_out, rng=studio.rng, only_held_out=True)
    return [
        _task("grid3_i2t", tasks.image_to_text(ring)),
        _task("grid3_t2i", tasks.text_to_image(ring)),
        _task("inverted_i2t", tasks.image_to_text(inverted)),
        _task("inverted_cls", tasks.position(inverted, rng=studio.rng), pool=tasks.digit_names()),
        _task("heldout_i2t", tasks.image_to_text(held_out)),
        _task("heldout_t2i", tasks.text_to_image(held_out)),
        _task("heldout_vqa", neighbours, pool=tasks.answers()),
    ]


def _examples(studio: Studio, drawn: list[Drawn], *, rows: int) -> dict[str, list[Example]]:
    """Every in-distribution subset but grounding, which needs crops."""
    rng = studio.rng
    asked = _shuffled(drawn, studio)[:rows]
    others = studio.draw(studio.compose([one.scene.layout for one in asked]), name="other")
    return {
        "scene_i2t": tasks.image_to_text(drawn),
        "scene_t2i": tasks.text_to_image(drawn),
        "scene_i2i": tasks.image_to_image(asked, others),
        "scene_it2i": tasks.edited_image(_shuffled(drawn, studio), among=drawn, rng=rng)[:rows],
        "position_cls": tasks.position(_shuffled(drawn, studio)[:rows], rng=rng),
        "count_vqa": tasks.count(_counts_in_turn(_shuffled(drawn, studio))[:rows]),
        "right_of_vqa": tasks.right_of(_shuffled(drawn, studio), rng=rng)[:rows],
    }


def _task(name: str, examples: list[Example], *, pool: list[Side] | None = None) -> Task:
    """Candidates are the whole pool, by default the positives of all rows."""
    if not examples:
        raise UserError(f"digits: so few scenes make no row of {name}; ask for more of them")
    sides = pool or [example.positive for example in examples]
    assert len(set(sides)) == len(sides), f"{name}: two candidates are the same"
    return Task(name, examples, sides, tasks.against_pool(examples, sides))


def _first(known: Sequence[Layout], count: int, *, what: str) -> Sequence[Layout]:
    if count > len(known):
        raise UserError(
            f"digits: {what}={count}, but only {len(known)} different layouts exist there; "
            "candidates must differ, so ask for fewer"
        )
    return known[:count]


def _shuffled(values: Sequence[_T], studio: Studio) -> list[_T]:
    return [values[number] for number in studio.rng.permutation(len(values))]


def _counts_in_turn(drawn: Sequence[Drawn]) -> list[Drawn]:
    """Scenes with one, two, three and four digits in turn, as long as there are any of each."""
    seen: dict[int, int] = {}
    turns = []
    for one in drawn:
        number = len(filled(one.scene.layout))
        turns.append(seen.get(number, 0))
        seen[number] = turns[-1] + 1
    return [drawn[index] for index in np.argsort(turns, kind="stable")]
