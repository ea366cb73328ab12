"""Answers to questions: the best span by its logits, and the official SQuAD scores of its text.

Rajpurkar et al. 2016 (v1.1) and 2018 (v2). Figures have the names that the evaluation scripts of both versions print,
as fractions of 1 where these print percent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ANSWER_METRICS",
    "OR_NONE_METRICS",
    "Spans",
    "best_spans",
    "best_threshold",
    "exact",
    "f1",
    "f1_or_none",
    "normalise",
    "score_answers",
    "score_or_none",
]

ANSWER_METRICS = ("f1", "exact_match")
"""Of v1.1, as `score_answers` gives them."""
OR_NONE_METRICS = (
    *("f1", "exact", "HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact"),
    *("best_f1", "best_exact"),
)
"""Of v2, as `score_or_none` gives them beside the two thresholds."""

CHUNK = 1024
"""Features whose spans are compared at a time: every one has the square of `n_best` spans."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Spans(NamedTuple):
    """The best span of each feature.

    `scores`: [features] sum of its logits, -inf where no span is possible; `starts` and `ends`: [features]
    its first and last token.
    """

    scores: Tensor
    starts: Tensor
    ends: Tensor


def best_spans(outputs: Tensor, allowed: Tensor, *, n_best: int, max_length: int) -> Spans:
    """The span of greatest start and end logit, among the most likely starts and ends of each feature.

    Args:
        outputs: [features, length, 2] start and end logits.
        allowed: [features, length] tokens that an answer may hold.
        n_best: how many starts, and how many ends, are combined.
        max_length: longest span in tokens.
    """
    parts = zip(torch.split(outputs, CHUNK), torch.split(allowed, CHUNK), strict=True)
    found = [_best_spans(*part, min(n_best, outputs.shape[1]), max_length) for part in parts]
    return Spans(*(torch.cat(values) for values in zip(*found, strict=True)))


def _best_spans(outputs: Tensor, allowed: Tensor, count: int, max_length: int) -> Spans:
    logits = outputs.float().masked_fill(~allowed[..., None], -torch.inf)
    (start_logits, starts), (end_logits, ends) = (logits[..., side].topk(count, dim=1) for side in (0, 1))
    extra = ends[:, None, :] - starts[:, :, None]  # [features, starts, ends] tokens beyond the first
    scores = start_logits[:, :, None] + end_logits[:, None, :]
    best = scores.masked_fill((extra < 0) | (extra >= max_length), -torch.inf).flatten(1).max(dim=1)
    row = torch.arange(len(outputs))
    return Spans(best.values, starts[row, best.indices // count], ends[row, best.indices % count])


# --- scores -------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, and with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact(predicted: str, true: str) -> float:
    """1 where both answers are the same once normalised, else 0."""
    return float(normalise(predicted) == normalise(true))


def f1(predicted: str, true: str) -> float:
    """F1 of the words of two answers once normalised, each as often as it occurs; 0 where they share none."""
    ours, theirs = normalise(predicted).split(), normalise(true).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    if not shared:
        return 0.0
    # Term by term as the scripts have it: the best threshold depends on sums of these to the last bit.
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def f1_or_none(predicted: str, true: str) -> float:
    """As `f1`, and 1 where both answers are empty once normalised."""
    return f1(predicted, true) if normalise(predicted) and normalise(true) else exact(predicted, true)


def score_answers(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD v1.1: mean over questions of the best `f1` and `exact` over the true answers.

    Args:
        predicted: [questions] answers.
        true: [questions] the answers that count as right, at least one each.

    Returns:
        `f1` and `exact_match`.
    """
    return {"f1": _mean(_best(f1, predicted, true)), "exact_match": _mean(_best(exact, predicted, true))}


def score_or_none(
    predicted: Sequence[str], true: Sequence[Sequence[str]], margins: Sequence[float], threshold: float
) -> dict[str, float]:
    """SQuAD v2, as its script does it when it is given `margins` (`--na-prob-file`) and a threshold.

    Where the margin exceeds the threshold, the answer is none, and right if the question has none.

    Args:
        predicted: [questions] answers, whether there may be none or not; "" where there is no span at all.
        true: [questions] the answers that count as right; of a question without any, none.
        margins: [questions] how much the score of no answer exceeds that of the answer.
        threshold: margin from which on no answer is given.

    Returns:
        `f1` and `exact`; both of the questions that have an answer (`HasAns_f1`, `HasAns_exact`) and of those that
        have none (`NoAns_f1`, `NoAns_exact`), where there are such questions; what both would be at the threshold
        that is best for each on these very questions (`best_f1`, `best_exact`), and these thresholds
        (`best_f1_thresh`, `best_exact_thresh`).
    """
    # A true answer of nothing but punctuation and articles does not count.
    worthy = [[answer for answer in answers if normalise(answer)] or [""] for answers in true]
    answerable = [bool(answers) for answers in true]
    scores, best = {}, {}
    for name, metric in (("f1", f1_or_none), ("exact", exact)):
        raw = _best(metric, predicted, worthy)
        best[f"best_{name}"], best[f"best_{name}_thresh"] = best_threshold(raw, predicted, answerable, margins)
        rows = list(zip(raw, answerable, margins, strict=True))
        final = [float(not has) if margin > threshold else value for value, has, margin in rows]
        scores[name] = _mean(final)
        for kind, wanted in (("HasAns", True), ("NoAns", False)):
            chosen = [value for value, has in zip(final, answerable, strict=True) if has is wanted]
            if chosen:
                scores[f"{kind}_{name}"] = _mean(chosen)
    return scores | best


def best_threshold(
    scores: Sequence[float], predicted: Sequence[str], answerable: Sequence[bool], margins: Sequence[float]
) -> tuple[float, float]:
    """The greatest mean score that a threshold on the margin gives, and the first such threshold.

    Like the script, it answers one question after the other in the order of their margins, beginning with none (at
    threshold 0, whatever the margins are), and takes the best prefix, even one that ends between equal margins.

    Args:
        scores: [questions] of the answers, were they given.
        predicted: [questions] answers.
        answerable: [questions] whether there is a true answer.
        margins: [questions] as in `score_or_none`.
    """
    current = best = float(answerable.count(False))
    threshold = 0.0
    for row in sorted(range(len(scores)), key=margins.__getitem__):
        current += scores[row] if answerable[row] else -float(bool(predicted[row]))
        if current > best:
            best, threshold = current, margins[row]
    return best / len(scores), threshold


def _best(metric: Callable[[str, str], float], predicted: Sequence[str], true: Sequence[Sequence[str]]) -> list[float]:
    return [max(metric(ours, one) for one in answers) for ours, answers in zip(predicted, true, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
