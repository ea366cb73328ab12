"""The official evaluations once more, step by step as their scripts go, to compare ours with.

Slow and plain on purpose: nothing here is shared with dsprune or with the libraries that it counts with.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence

Scores = dict[str, float]


# --- CoNLL-2003: conlleval ------------------------------------------------------------------


def conlleval(lines: Iterable[str]) -> Scores:
    """Chunks of lines `word true predicted`, with an empty line after each sentence.

    One pass, with the previous tags of both columns in hand and a note whether the chunk that is open in
    both of them has been the same so far.
    """
    right = found = wanted = 0
    same = False
    last_true = last_guess = ("O", "")
    for line in lines:
        _, true, guess = line.split() or ("", "O", "O")
        true_now, guess_now = (tuple((tag + "-").split("-")[:2]) for tag in (true, guess))
        true_ends, guess_ends = _ends(last_true, true_now), _ends(last_guess, guess_now)
        true_starts, guess_starts = _starts(last_true, true_now), _starts(last_guess, guess_now)
        if same:
            if true_ends and guess_ends and last_true[1] == last_guess[1]:
                right += 1
                same = False
            elif true_ends != guess_ends or true_now[1] != guess_now[1]:
                same = False
        if true_starts and guess_starts and true_now[1] == guess_now[1]:
            same = True
        wanted += true_starts
        found += guess_starts
        last_true, last_guess = true_now, guess_now
    right += same
    precision = right / found if found else 0.0
    recall = right / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def _starts(last: tuple[str, ...], now: tuple[str, ...]) -> bool:
    (before, kind_before), (tag, kind) = last, now
    return tag == "B" or (tag == "I" and before == "O") or (tag != "O" and kind != kind_before)


def _ends(last: tuple[str, ...], now: tuple[str, ...]) -> bool:
    (before, kind_before), (tag, kind) = last, now
    return before != "O" and (tag in ("B", "O") or kind != kind_before)


# --- SQuAD: both versions -------------------------------------------------------------------


def squad_v1(answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> Scores:
    """Percent, by the questions' ids."""
    exact = f1 = 0.0
    for question, true in answers.items():
        exact += max(_same(predictions[question], one) for one in true)
        f1 += max(_overlap(predictions[question], one) for one in true)
    return {"exact_match": 100.0 * exact / len(answers), "f1": 100.0 * f1 / len(answers)}


def squad_v2(
    answers: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    no_answer: Mapping[str, float],
    threshold: float,
) -> Scores:
    """Percent, by the questions' ids; `no_answer` is what `--na-prob-file` holds."""
    has = {question: bool(true) for question, true in answers.items()}
    exact, f1 = {}, {}
    for question, true in answers.items():
        gold = [one for one in true if _words(one)] or [""]
        exact[question] = max(_same(predictions[question], one) for one in gold)
        f1[question] = max(_overlap_or_none(predictions[question], one) for one in gold)
    out: Scores = {}
    for name, raw in (("exact", exact), ("f1", f1)):
        given = {q: (0.0 if has[q] else 1.0) if no_answer[q] > threshold else raw[q] for q in raw}
        out[name] = 100.0 * sum(given.values()) / len(given)
        for kind, wanted in (("HasAns", True), ("NoAns", False)):
            some = [given[q] for q in given if has[q] == wanted]
            if some:
                out[f"{kind}_{name}"] = 100.0 * sum(some) / len(some)
        score = best = float(sum(not value for value in has.values()))
        at = 0.0
        for question in sorted(no_answer, key=lambda q: no_answer[q]):
            if has[question]:
                score += raw[question]
            elif predictions[question]:
                score -= 1.0
            if score > best:
                best, at = score, no_answer[question]
        out[f"best_{name}"] = 100.0 * best / len(raw)
        out[f"best_{name}_thresh"] = at
    return out


def _words(answer: str) -> list[str]:
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    # An article is a whole run of word characters; what follows it may be any other character.
    out, run = [], ""
    for letter in bare + " ":
        if letter.isalnum() or letter == "_":
            run += letter
            continue
        out += [" " if run in ("a", "an", "the") else run, letter]
        run = ""
    return "".join(out).split()


def _same(ours: str, theirs: str) -> float:
    return float(_words(ours) == _words(theirs))


def _overlap(ours: str, theirs: str) -> float:
    mine, left = _words(ours), _words(theirs)
    total, shared = len(left), 0
    for word in mine:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(mine), shared / total
    return 2 * precision * recall / (precision + recall)


def _overlap_or_none(ours: str, theirs: str) -> float:
    if not _words(ours) or not _words(theirs):
        return float(_words(ours) == _words(theirs))
    return _overlap(ours, theirs)


# --- GLUE -----------------------------------------------------------------------------------


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> float:
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def f1(predicted: Sequence[int], true: Sequence[int]) -> float:
    tp, fp, fn, _ = _table(predicted, true)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def mcc(predicted: Sequence[int], true: Sequence[int]) -> float:
    tp, fp, fn, tn = _table(predicted, true)
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0


def pearson(predicted: Sequence[float], true: Sequence[float]) -> float:
    means = [math.fsum(values) / len(values) for values in (predicted, true)]
    ours, theirs = ([v - mean for v in values] for values, mean in zip((predicted, true), means, strict=True))
    return _dot(ours, theirs) / math.sqrt(_dot(ours, ours) * _dot(theirs, theirs))


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def spearman(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Pearson's of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(true))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def _table(predicted: Sequence[int], true: Sequence[int]) -> tuple[int, int, int, int]:
    pairs = list(zip(predicted, true, strict=True))
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))
