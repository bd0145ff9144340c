"""The embedded data set: reproducible, without leaks, its captions true to what is drawn."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cocoa_pl.data import digit_scenes as scenes
from cocoa_pl.data import digits
from cocoa_pl.data.digit_scenes import EMPTY, HELD_OUT_PAIRS, Layout
from cocoa_pl.data.digits import DigitsBenchmark, DigitsData
from cocoa_pl.data.items import GROUPS, EvalSubset, Item
from cocoa_pl.errors import UserError

WORDS = {word: digit for digit, word in enumerate(scenes.DIGIT_WORDS)}


def make_data(cache: Path, **changes: Any) -> DigitsData:
    values: dict[str, Any] = {"seed": 0, "scenes": 60, "task_rows": 20, "validation_rows": 25}
    captions = ["scene_i2t", "scene_t2i"]
    return DigitsData(cache_dir=str(cache), caption_subsets=captions, **(values | changes))


def make_benchmark(cache: Path, *, scenes: int = 80) -> DigitsBenchmark:
    return DigitsBenchmark(name="digits", cache_dir=str(cache), seed=0, scenes=scenes, task_rows=30)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DigitsData:
    return make_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def subsets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvalSubset]:
    benchmark = make_benchmark(tmp_path_factory.mktemp("cache"))
    return {subset.name: subset for subset in benchmark.subsets()}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def layout_of(caption: str, *, places: tuple[str, ...] = scenes.PLACES) -> Layout:
    """The layout that a caption describes: the inverse of `scenes.caption`."""
    cells = dict.fromkeys(places, EMPTY)
    for phrase in caption.replace(" and ", ", ").split(", "):
        word, _, place = phrase.partition(" ")
        cells[place] = WORDS[word]
    return tuple(cells.values())


def asked(subset: EvalSubset) -> Iterator[tuple[Item, Item, list[Item]]]:
    """Of each row the query, its positive and the other candidates."""
    for index, row in zip(subset.query_index, subset.candidate_index, strict=True):
        positive, *others = (subset.candidates[number] for number in row)
        yield subset.queries[index], positive, others


def pixels(item: Item) -> np.ndarray:
    (path,) = item.media
    assert isinstance(path, Path)
    return np.asarray(Image.open(path))


# --- handwriting, layouts, captions --------------------------------------------------------------


def test_handwriting_is_real_and_in_exactly_one_split() -> None:
    _, by_split = scenes.load_handwriting()
    parts = {split: np.concatenate(own) for split, own in by_split.items()}
    assert sorted(chain.from_iterable(parts.values())) == list(range(1797))
    shares = [len(part) / 1797 for part in parts.values()]
    assert shares == pytest.approx([0.60, 0.15, 0.25], abs=0.01)
    assert all(len(own) >= 20 for split in by_split.values() for own in split)
    scene = scenes.compose((1, 2, 3, 4) * 20, split="validation", rng=np.random.default_rng(0))
    assert set(scene.glyphs) <= set(parts["validation"])


def test_layouts_are_in_exactly_one_split_and_held_out_pairs_in_none() -> None:
    parts = [scenes.layouts(split) for split in ("train", "validation", "test")]
    together = [*chain.from_iterable(parts), *scenes.layouts("held_out"), (EMPTY,) * 4]
    assert Counter(together) == Counter(product(range(EMPTY, 10), repeat=4))
    shown = {layout[cell : cell + 2] for layout in chain(*parts) for cell in (0, 2)}
    assert not shown & HELD_OUT_PAIRS
    assert len(HELD_OUT_PAIRS) == len({a for a, _ in HELD_OUT_PAIRS}) == 10


def test_caption_determines_its_layout() -> None:
    everything = [*scenes.layouts("train"), *scenes.layouts("test"), *scenes.layouts("held_out")]
    assert [layout_of(scenes.caption(layout)) for layout in everything] == everything
    words = scenes.caption((3, 7, 5, EMPTY))
    assert words == "three top left, seven top right and five bottom left"
    rings = scenes.ring_layouts(np.random.default_rng(0), count=200)
    assert len(set(rings)) == 200
    places = scenes.RING_PLACES
    assert [layout_of(scenes.caption(ring), places=places) for ring in rings] == rings


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ((4, EMPTY, 5, 9), "Replace the top left digit by four"),
        ((3, 2, 5, 9), "Add two at the top right"),
        ((3, EMPTY, 5, EMPTY), "Remove the bottom right digit"),
        ((3, EMPTY, 5, 9), None),  # itself
        ((4, 2, 5, 9), None),
    ],
)
def test_an_edit_names_the_one_change(after: Layout, words: str | None) -> None:
    rng = np.random.default_rng(0)
    scene, other = (scenes.Scene(one, (), (), f"{one}") for one in ((3, EMPTY, 5, 9), after))
    found = scenes.find_edited(scene, {after: other}, rng)
    if words is None:
        assert found is None
        return
    assert found == scenes.Example(
        scenes.about(scene, words), scenes.target(other.image), scenes.target(scene.image)
    )


def test_drawing_puts_each_digit_into_its_cell() -> None:
    scene = scenes.compose((3, EMPTY, EMPTY, 8), split="test", rng=np.random.default_rng(0))
    picture = scenes.draw(scene)
    assert (picture.shape, picture.dtype) == ((56, 56), np.uint8)
    assert np.array_equal(scenes.draw(scene, inverted=True), 255 - picture)
    ink, _ = scenes.load_handwriting()
    expected = np.full((56, 56), 255, np.uint8)
    for cell, top, left in ((0, 0, 0), (3, 28, 28)):
        down, right = scene.offsets[cell]
        place = expected[top + down : top + down + 24, left + right : left + right + 24]
        place -= ink[scene.glyphs[cell]]
    assert np.array_equal(picture, expected)


# --- written folders -----------------------------------------------------------------------------


def test_same_numbers_give_the_same_bytes_and_other_seeds_do_not(
    data: DigitsData, tmp_path: Path
) -> None:
    first = contents(data.prepare())
    assert contents(make_data(tmp_path).prepare()) == first
    other = contents(make_data(tmp_path, seed=1).prepare())
    assert other.keys() != first.keys() or other != first


def test_a_finished_folder_is_used_and_an_interrupted_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_benchmark(tmp_path).prepare()

    def interrupted(root: Path, **_: int) -> None:
        root.mkdir()
        (root / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "write_benchmark", interrupted)
    assert make_benchmark(tmp_path).prepare() == root
    with pytest.raises(KeyboardInterrupt):
        make_benchmark(tmp_path / "other").prepare()
    assert list((tmp_path / "other").iterdir()) == []

    def overtaken(draft: Path, **_: int) -> None:
        draft.mkdir()
        (draft.parents[1] / root.name / "test").mkdir(parents=True)  # another process was first

    monkeypatch.setattr(digits, "write_benchmark", overtaken)
    assert [p.name for p in make_benchmark(tmp_path / "other").prepare().iterdir()] == ["test"]


def test_more_candidates_than_layouts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scenes=2000, but only 1500 different layouts"):
        make_benchmark(tmp_path, scenes=2000).prepare()


# --- training and validation ---------------------------------------------------------------------


def test_no_training_caption_shows_a_held_out_pair_or_a_test_layout(
    data: DigitsData, subsets: dict[str, EvalSubset]
) -> None:
    captions = {pair.positive.text for pair in data.train_pairs() if pair.subset == "scene_i2t"}
    layouts = [layout_of(caption) for caption in captions]
    assert not HELD_OUT_PAIRS & {layout[cell : cell + 2] for layout in layouts for cell in (0, 2)}
    for name in ("scene_i2t", "heldout_i2t"):
        assert not captions & {item.text for item in subsets[name].candidates}


def test_splits_share_no_picture(data: DigitsData, subsets: dict[str, EvalSubset]) -> None:
    parts = [
        {
            pixels(one).tobytes()
            for pair in pairs
            for one in (pair.query, pair.positive)
            if one.media
        }
        for pairs in (data.train_pairs(), data.validation_pairs())
    ]
    tested = (item for subset in subsets.values() for item in subset.queries if item.media)
    parts.append({pixels(item).tobytes() for item in tested})
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_training_validation_and_test_have_the_same_tasks_in_the_same_words(
    data: DigitsData, subsets: dict[str, EvalSubset]
) -> None:
    def wordings(items: list[Item]) -> set[str]:
        names = {*WORDS, "top", "bottom", "left", "right", "digit"}
        texts = [item.text.replace("?", "").split() for item in items]
        return {" ".join(word for word in text if word not in names) for text in texts}

    names = {pair.subset for pair in data.train_pairs()}
    assert {pair.subset for pair in data.validation_pairs()} == names
    assert {subset.name for subset in data.validation_subsets()} == names
    assert names == {name for name, subset in subsets.items() if subset.in_distribution}
    for name in ("scene_i2t", "scene_i2i", "count_vqa", "position_cls", "right_of_vqa"):
        trained = wordings([pair.query for pair in data.train_pairs() if pair.subset == name])
        assert wordings(subsets[name].queries) <= trained


# --- benchmark -----------------------------------------------------------------------------------


def test_benchmark_covers_all_groups_in_and_out_of_distribution(
    subsets: dict[str, EvalSubset],
) -> None:
    assert {subset.group for subset in subsets.values()} == set(GROUPS)
    for subset in subsets.values():
        assert len({item.key for item in subset.candidates}) == len(subset.candidates)
        assert all(len(set(row.tolist())) == len(row) > 1 for row in subset.candidate_index)
    assert {name for name, subset in subsets.items() if not subset.in_distribution} == {
        "grid3_i2t", "grid3_t2i", "inverted_i2t", "inverted_cls",
        "heldout_i2t", "heldout_t2i", "heldout_vqa",
    }  # fmt: skip


def test_answers_agree_with_the_captions_of_their_scenes(subsets: dict[str, EvalSubset]) -> None:
    layout_by_image = {
        query.media: layout_of(caption.text) for query, caption, _ in asked(subsets["scene_i2t"])
    }
    for name in ("position_cls", "count_vqa", "right_of_vqa"):
        for query, answer, _ in asked(subsets[name]):
            layout = layout_by_image[query.media]
            words = query.plain_text.rstrip("?")
            if name == "position_cls":
                expected = layout[scenes.PLACES.index(words.removeprefix("Which digit is "))]
            elif name == "count_vqa":
                expected = sum(digit != EMPTY for digit in layout)
            else:
                left = WORDS[words.rpartition(" ")[2]]
                assert layout.count(left) == 1
                expected = layout[layout.index(left) + 1]
            assert answer.text == ("nothing" if expected == EMPTY else scenes.DIGIT_WORDS[expected])


def test_crop_to_find_is_cut_from_the_scene_and_unlike_all_others(
    subsets: dict[str, EvalSubset],
) -> None:
    for query, positive, others in asked(subsets["grounding"]):
        scene, crop = pixels(query), pixels(positive)
        cells = [scene[top : top + 28, left : left + 28] for top in (0, 28) for left in (0, 28)]
        assert any(np.array_equal(crop, cell) for cell in cells)
        assert not any(np.array_equal(crop, pixels(other)) for other in others)


def test_held_out_questions_ask_for_held_out_neighbours(subsets: dict[str, EvalSubset]) -> None:
    for query, answer, _ in asked(subsets["heldout_vqa"]):
        left = WORDS[query.plain_text.rstrip("?").rpartition(" ")[2]]
        assert (left, WORDS[answer.text]) in HELD_OUT_PAIRS
