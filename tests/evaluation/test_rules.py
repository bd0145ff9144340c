"""MMEB's rule, the strict rule, and embeddings that are refused."""

import numpy as np
import pytest

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation import scoring
from cocoa_pl.evaluation.scoring import check_embeddings, rule_hits


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("scores", "official", "strict"),
    [
        ([0.9, 0.5, 0.1], True, True),
        ([0.5, 0.9, 0.1], False, False),
        ([0.9, 0.9, 0.1], True, False),
        ([0.3, 0.3, 0.3], True, False),
        ([np.nan, np.nan, np.nan], True, False),
        ([0.9, np.nan, 0.1], False, False),
        ([np.inf, 0.5, 0.1], True, False),
    ],
    ids=["hit", "miss", "tie", "collapsed", "all nan", "one nan", "inf"],
)
def test_official_rule_is_argmax_zero_and_strict_rule_wants_a_lead(
    scores: list[float], official: bool, strict: bool
) -> None:
    got = rule_hits(np.array(scores[:1]), np.array([np.max(scores[1:])]))
    assert (got[0].tolist(), got[1].tolist()) == ([official], [strict])


GOOD = np.eye(4, dtype=np.float32)


def broken(row: int, value: object) -> np.ndarray:
    embeddings = GOOD.copy()
    embeddings[row] = value
    return embeddings


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (broken(2, np.nan), r"i2t queries: 1 of 4 embeddings \(first: number 2\) have NaN or inf"),
        (broken(1, np.inf), r"first: number 1\) have NaN or inf"),
        (broken(3, 0.0), r"first: number 3\) have a length other than 1 \(worst 0\)"),
        (GOOD * 1.5, r"4 of 4 embeddings .* length other than 1 \(worst 1.5\)"),
        (np.repeat(GOOD[:1], 4, axis=0), "all 4 embeddings are the same vector"),
    ],
    ids=["nan", "inf", "zero", "not unit", "collapsed"],
)
def test_broken_embeddings_are_an_error_that_names_them(
    embeddings: np.ndarray, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_embeddings(embeddings, name="i2t queries")


def test_a_collapse_that_is_not_quite_exact_is_still_one() -> None:
    noise = np.random.default_rng(0).normal(size=(100, 64)) * 1e-6
    with pytest.raises(UserError, match="collapsed"):
        check_embeddings(unit(np.ones((100, 64)) + noise), name="x")


@pytest.mark.parametrize("row", [0, 4999, 9999])
def test_embeddings_are_checked_in_every_block(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CHECKED", 100)
    embeddings = unit(np.random.default_rng(0).normal(size=(10_000, 4)))
    check_embeddings(embeddings, name="x")
    for value, message in ((np.nan, "NaN or inf"), (3.0, "length other than 1")):
        wrong = embeddings.copy()
        wrong[row] = value
        with pytest.raises(
            UserError, match=rf"1 of 10000 .*first: number {row}\) have .*{message}"
        ):
            check_embeddings(wrong, name="x")
    same = np.repeat(embeddings[:1], 10_000, axis=0)
    with pytest.raises(UserError, match="collapsed"):
        check_embeddings(same, name="x")
    same[row] = embeddings[1]
    check_embeddings(same, name="x")


def test_float16_embeddings_are_judged_like_the_float32_ones_they_round() -> None:
    embeddings = unit(np.random.default_rng(0).normal(size=(100, 64)))
    check_embeddings(embeddings.astype(np.float16), name="x")
    with pytest.raises(UserError, match="collapsed"):
        check_embeddings(unit(np.ones((100, 64))).astype(np.float16), name="x")


def test_bfloat16_rounding_and_a_single_embedding_pass() -> None:
    check_embeddings(GOOD * np.float32(1.004), name="x")
    check_embeddings(GOOD[:1], name="x")
