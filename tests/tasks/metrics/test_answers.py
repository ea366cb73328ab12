from __future__ import annotations

import pytest
import torch

from dsprune.tasks.metrics.answers import (
    best_spans,
    exact,
    f1,
    f1_or_none,
    normalise,
    score_answers,
    score_or_none,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an  apple,\ta\nday", "apple day"),
        ("U.S.", "us"),
        ("well-known", "wellknown"),
        ("theatre of another Anna", "theatre of another anna"),
        ("the", ""),
        (".", ""),
        ("$1,000.50", "100050"),
        ("“Cat”", "“cat”"),  # only ASCII punctuation is taken off
        ("vitamin A", "vitamin"),
        ("ÉTÉ", "été"),
        # Punctuation goes before articles: what it leaves standing alone is no article if it was part of a word.
        ("a.m.", "am"),
        ("(a) cat", "cat"),
        ("a-cat", "acat"),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_exact_match() -> None:
    assert exact("The Broncos.", "broncos") == 1.0
    assert exact("Denver Broncos", "Broncos") == 0.0
    assert exact("the", ".") == 1.0


def test_f1_by_hand() -> None:
    assert f1("the big cat", "cat sat on big mat") == pytest.approx(2 * (2 / 2) * (2 / 5) / (2 / 2 + 2 / 5))
    assert f1("to to", "to") == pytest.approx(2 * 0.5 * 1 / 1.5)  # a word counts as often as it occurs
    assert f1("dog", "cat") == 0.0
    assert f1("The cat", "cat") == 1.0


def test_empty_answers_differ_between_the_versions() -> None:
    assert f1(".", ".") == 0.0
    assert f1_or_none(".", ".") == f1_or_none("", "") == 1.0
    assert f1_or_none("", "cat") == f1_or_none("cat", "") == 0.0


def test_the_best_of_several_true_answers_counts() -> None:
    scores = score_answers(["Denver Broncos", "gold"], [["Carolina", "the Broncos", "Denver"], ["red", "Gold"]])
    assert scores == {"f1": pytest.approx((2 / 3 + 1) / 2), "exact_match": pytest.approx(1 / 2)}


def test_questions_without_answer() -> None:
    predicted = ["dog", "cat", "cat", "the big cat"]
    scores = score_or_none(predicted, [[], [], ["cat"], ["cat", "dog"]], [1.0, -1.0, 0.5, 0.0], 0.0)
    assert scores == {
        "f1": pytest.approx((1 + 0 + 0 + 2 / 3) / 4),
        "exact": pytest.approx(1 / 4),
        "HasAns_f1": pytest.approx((0 + 2 / 3) / 2),
        "HasAns_exact": 0.0,
        "NoAns_f1": pytest.approx(1 / 2),
        "NoAns_exact": pytest.approx(1 / 2),
        # In the order of the margins: cat for none, 2/3 or nothing, the right cat, and then dog for none. At 0.5
        # three are answered and one is right as none.
        "best_f1": pytest.approx((0 + 2 / 3 + 1 + 1) / 4),
        "best_f1_thresh": 0.5,
        # Exactly, that is no more than without any answer, which the script calls a threshold of 0.
        "best_exact": pytest.approx(2 / 4),
        "best_exact_thresh": 0.0,
    }


def test_the_threshold_has_to_be_exceeded() -> None:
    assert score_or_none(["cat"], [["cat"]], [0.5], 0.5)["f1"] == 1.0
    assert score_or_none(["cat"], [["cat"]], [0.5], 0.4)["f1"] == 0.0
    assert score_or_none(["cat"], [[]], [0.5], 0.4)["f1"] == 1.0


def test_kinds_of_questions_that_do_not_occur_have_no_figure() -> None:
    always = {"f1", "exact", "best_f1", "best_exact", "best_f1_thresh", "best_exact_thresh"}
    assert set(score_or_none(["cat"], [["cat"]], [0.0], 0.0)) == always | {"HasAns_f1", "HasAns_exact"}
    assert set(score_or_none(["cat"], [[]], [0.0], 0.0)) == always | {"NoAns_f1", "NoAns_exact"}


def test_true_answers_of_nothing_but_punctuation_do_not_count_in_v2() -> None:
    scores = score_or_none(["the"], [["."]], [-1.0], 0.0)
    assert (scores["f1"], scores["HasAns_f1"]) == (1.0, 1.0)
    assert score_or_none(["the"], [[".", "cat"]], [-1.0], 0.0)["f1"] == 0.0
    # No answer is wrong even there: the script goes by whether answers are listed.
    assert score_or_none(["the"], [["."]], [1.0], 0.0)["f1"] == 0.0


def spans(starts: list[float], ends: list[float], allowed: list[int], n_best: int = 20, max_length: int = 30):
    outputs = torch.tensor([starts, ends]).T[None]
    mask = torch.zeros(1, len(starts), dtype=torch.bool)
    mask[0, allowed] = True
    best = best_spans(outputs, mask, n_best=n_best, max_length=max_length)
    return best.scores.item(), best.starts.item(), best.ends.item()


def test_the_best_span() -> None:
    starts, ends = [9.0, 1.0, 5.0, 2.0, 0.0], [0.0, 7.0, 1.0, 4.0, 9.0]
    assert spans(starts, ends, [1, 2, 3]) == (9.0, 2, 3)  # an end before its start would give 12
    assert spans(starts, ends, [0, 1, 2, 3, 4]) == (18.0, 0, 4)
    assert spans(starts, ends, [1, 2, 3], max_length=1) == (8.0, 1, 1)
    assert spans(starts, ends, [0, 1, 2, 3, 4], max_length=4) == (16.0, 0, 1)
    assert spans(starts, ends, [0, 1, 2, 3, 4], max_length=5) == (18.0, 0, 4)


def test_only_the_likeliest_starts_and_ends_are_combined() -> None:
    starts, ends = [1.0, 5.0, 2.0], [0.0, 4.0, 3.0]
    assert spans(starts, [6.0, 0.0, 3.0], [0, 1, 2], n_best=1)[0] == -torch.inf  # start 1 and end 0
    assert spans(starts, [6.0, 0.0, 3.0], [0, 1, 2], n_best=2) == (8.0, 1, 2)
    assert spans(starts, ends, [0, 1, 2], n_best=1) == (9.0, 1, 1)


def test_a_feature_without_context_has_no_span() -> None:
    assert spans([1.0, 2.0], [1.0, 2.0], [])[0] == -torch.inf


def test_features_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = torch.randn(7, 12, 2, generator=torch.Generator().manual_seed(0))
    allowed = torch.rand(7, 12, generator=torch.Generator().manual_seed(1)) < 0.7
    whole = best_spans(outputs, allowed, n_best=5, max_length=6)
    monkeypatch.setattr("dsprune.tasks.metrics.answers.CHUNK", 3)
    chunked = best_spans(outputs, allowed, n_best=5, max_length=6)
    assert all(map(torch.equal, whole, chunked))


def test_every_span_is_considered_where_n_best_allows_it() -> None:
    outputs = torch.randn(5, 9, 2, generator=torch.Generator().manual_seed(3))
    best = best_spans(outputs, torch.ones(5, 9, dtype=torch.bool), n_best=9, max_length=4)
    for feature in range(5):
        expected = max(
            (float(outputs[feature, i, 0] + outputs[feature, j, 1]), i, j)
            for i in range(9)
            for j in range(i, min(i + 4, 9))
        )
        assert (best.scores[feature].item(), best.starts[feature].item(), best.ends[feature].item()) == expected
