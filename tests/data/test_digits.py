"""The embedded data set: reproducible, without leaks, its captions true to what is drawn."""

from collections import Counter
from itertools import chain, product
from pathlib import Path

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


def make_data(cache: Path, *, seed: int = 0, scene_count: int = 60) -> DigitsData:
    return DigitsData(
        cache_dir=str(cache),
        seed=seed,
        scenes=scene_count,
        task_rows=20,
        validation_rows=25,
        caption_subsets=["scene_i2t", "scene_t2i"],
        on_bad_row="fail",
    )


def make_benchmark(cache: Path, *, seed: int = 0, scene_count: int = 80) -> DigitsBenchmark:
    return DigitsBenchmark(
        name="digits",
        cache_dir=str(cache),
        seed=seed,
        scenes=scene_count,
        task_rows=30,
        on_bad_row="fail",
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> DigitsData:
    return make_data(cache)


@pytest.fixture(scope="module")
def subsets(cache: Path) -> dict[str, EvalSubset]:
    return {subset.name: subset for subset in make_benchmark(cache).subsets()}


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


# --- handwriting, layouts, captions --------------------------------------------------------------


def test_handwriting_is_real_and_in_exactly_one_split() -> None:
    handwriting = scenes.load_handwriting()
    parts = {split: np.concatenate(own) for split, own in handwriting.by_split.items()}
    assert sorted(chain.from_iterable(parts.values())) == list(range(1797))
    shares = [len(part) / 1797 for part in parts.values()]
    assert shares == pytest.approx([0.60, 0.15, 0.25], abs=0.01)
    assert all(len(own) >= 20 for split in handwriting.by_split.values() for own in split)
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


def test_edit_names_the_change() -> None:
    before = (3, EMPTY, 5, 9)
    assert scenes.edit(before, (4, EMPTY, 5, 9)) == "Replace the top left digit by four"
    assert scenes.edit(before, (3, 2, 5, 9)) == "Add two at the top right"
    assert scenes.edit(before, (3, EMPTY, 5, EMPTY)) == "Remove the bottom right digit"
    assert scenes.edit(before, before) is None
    assert scenes.edit(before, (4, 2, 5, 9)) is None


def test_drawing_puts_each_digit_into_its_cell() -> None:
    scene = scenes.compose((3, EMPTY, EMPTY, 8), split="test", rng=np.random.default_rng(0))
    picture = scenes.draw(scene)
    assert (picture.shape, picture.dtype) == ((56, 56), np.uint8)
    assert [scenes.crop(picture, cell=cell).min() < 60 for cell in range(4)] == [
        True, False, False, True,
    ]  # fmt: skip
    assert np.array_equal(scenes.draw(scene, inverted=True), 255 - picture)
    down, right = scene.offsets[3]
    glyph = scenes.load_handwriting().ink[scene.glyphs[3]]
    assert np.array_equal(255 - picture[28 + down : 52 + down, 28 + right : 52 + right], glyph)


# --- written folders -----------------------------------------------------------------------------


def test_same_numbers_give_the_same_bytes_and_other_seeds_do_not(
    data: DigitsData, tmp_path: Path
) -> None:
    first = contents(data.prepare())
    assert contents(make_data(tmp_path).prepare()) == first
    other = contents(make_data(tmp_path, seed=1).prepare())
    assert other.keys() != first.keys() or other != first


def test_finished_folder_is_used_and_interrupted_one_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = make_benchmark(tmp_path)
    root = benchmark.prepare()
    whole = contents(root)
    (root / "complete.json").unlink()
    (root / "test" / "scene_i2t" / "test-00000-of-00001.parquet").write_bytes(b"half")
    assert benchmark.prepare() == root
    assert contents(root) == whole
    monkeypatch.setattr(digits, "write_benchmark", None)  # calling it would fail
    assert benchmark.prepare() == root

    def interrupted(root: Path, **_: int) -> None:
        (root / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "write_benchmark", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_benchmark(tmp_path / "other").prepare()
    assert list((tmp_path / "other").iterdir()) == []


def test_more_candidates_than_layouts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scenes=2000, but only 1500 different layouts"):
        make_benchmark(tmp_path, scene_count=2000).prepare()


# --- training rows -------------------------------------------------------------------------------


def test_no_training_caption_shows_a_held_out_pair_or_a_test_layout(
    data: DigitsData, subsets: dict[str, EvalSubset]
) -> None:
    captions = {pair.positive.text for pair in data.train_pairs() if pair.subset == "scene_i2t"}
    assert not any(scenes.has_held_out_pair(layout_of(caption)) for caption in captions)
    for name in ("scene_i2t", "heldout_i2t"):
        assert not captions & {item.text for item in subsets[name].candidates}


def test_splits_share_no_picture(data: DigitsData, subsets: dict[str, EvalSubset]) -> None:
    def pixels(items: list[Item]) -> set[bytes]:
        images = {image for item in items for image in item.media}
        return {Image.open(image).tobytes() for image in images if isinstance(image, Path)}

    parts = [
        pixels([side for pair in pairs for side in (pair.query, pair.positive)])
        for pairs in (data.train_pairs(), data.validation_pairs())
    ]
    parts.append(pixels([item for one in subsets.values() for item in one.queries]))
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_validation_has_the_same_tasks_with_and_without_candidates(data: DigitsData) -> None:
    names = {pair.subset for pair in data.train_pairs()}
    assert {pair.subset for pair in data.validation_pairs()} == names
    assert {subset.name for subset in data.validation_subsets()} == names


def test_training_and_evaluation_ask_in_the_same_words(
    data: DigitsData, subsets: dict[str, EvalSubset]
) -> None:
    def wordings(items: list[Item]) -> set[str]:
        names = {*WORDS, "top", "bottom", "left", "right", "digit"}
        texts = [item.text.replace("?", "").split() for item in items]
        return {" ".join(word for word in text if word not in names) for text in texts}

    for name in ("scene_i2t", "scene_i2i", "count_vqa", "position_cls", "right_of_vqa"):
        asked = wordings([pair.query for pair in data.train_pairs() if pair.subset == name])
        assert wordings(subsets[name].queries) <= asked


# --- benchmark -----------------------------------------------------------------------------------


def test_benchmark_covers_all_groups_in_and_out_of_distribution(
    subsets: dict[str, EvalSubset],
) -> None:
    assert {subset.group for subset in subsets.values()} == set(GROUPS)
    outside = {name for name, subset in subsets.items() if not subset.in_distribution}
    for subset in subsets.values():
        assert len({item.key for item in subset.candidates}) == len(subset.candidates)
        assert all(len(set(row.tolist())) == len(row) > 1 for row in subset.candidate_index)
    assert outside == {
        "grid3_i2t", "grid3_t2i", "inverted_i2t", "inverted_cls",
        "heldout_i2t", "heldout_t2i", "heldout_vqa",
    }  # fmt: skip


def test_answers_agree_with_the_captions_of_their_scenes(subsets: dict[str, EvalSubset]) -> None:
    captions = subsets["scene_i2t"]
    layout_by_image = {
        query.media: layout_of(captions.candidates[int(row[0])].text)
        for query, row in zip(captions.queries, captions.candidate_index, strict=True)
    }
    for name in ("position_cls", "count_vqa", "right_of_vqa"):
        subset = subsets[name]
        for index, row in zip(subset.query_index, subset.candidate_index, strict=True):
            query = subset.queries[index]
            layout = layout_by_image[query.media]
            words = query.plain_text.rstrip("?")
            if name == "position_cls":
                place = words.removeprefix("Which digit is ")
                expected = layout[scenes.PLACES.index(place)]
            elif name == "count_vqa":
                expected = sum(digit != EMPTY for digit in layout)
            else:
                left = WORDS[words.rpartition(" ")[2]]
                assert layout.count(left) == 1
                expected = layout[layout.index(left) + 1]
            answer = subset.candidates[int(row[0])].text
            assert answer == ("nothing" if expected == EMPTY else scenes.DIGIT_WORDS[expected])


def test_crop_to_find_is_cut_from_the_scene_and_unlike_all_others(
    subsets: dict[str, EvalSubset],
) -> None:
    subset = subsets["grounding"]

    def pixels(item: Item) -> np.ndarray:
        (path,) = item.media
        assert isinstance(path, Path)
        return np.asarray(Image.open(path))

    crops = [pixels(item) for item in subset.candidates]
    for index, row in zip(subset.query_index, subset.candidate_index, strict=True):
        scene = pixels(subset.queries[index])
        cells = [scenes.crop(scene, cell=cell) for cell in range(4)]
        assert any(np.array_equal(crops[row[0]], cell) for cell in cells)
        assert not any(np.array_equal(crops[row[0]], crops[other]) for other in row[1:])


def test_held_out_questions_ask_for_held_out_neighbours(subsets: dict[str, EvalSubset]) -> None:
    subset = subsets["heldout_vqa"]
    for index, row in zip(subset.query_index, subset.candidate_index, strict=True):
        left = WORDS[subset.queries[index].plain_text.rstrip("?").rpartition(" ")[2]]
        assert (left, WORDS[subset.candidates[int(row[0])].text]) in HELD_OUT_PAIRS
