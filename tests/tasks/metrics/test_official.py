"""Our figures against the official evaluations, on hundreds of predictions with mistakes of every kind.

With DSPRUNE_DATA=FOLDER the real splits are taken as well.
"""

# ruff: noqa: RUF001

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from dsprune.tasks.benchmarks.conll import TAG_NAMES
from dsprune.tasks.kinds.tokens import entity_scores
from dsprune.tasks.metrics.answers import score_answers, score_or_none
from dsprune.tasks.metrics.official import METRICS, score
from dsprune.tasks.metrics.rouge_l import UnicodeTokenizer, reads_more, rouge_l
from tests.tasks.metrics import official

FOLDER = os.environ.get("DSPRUNE_DATA", "")
EXACT = 1e-12
"""What float64 loses on another order of the same sums."""

real = pytest.mark.skipif(not FOLDER, reason="needs DSPRUNE_DATA, a folder with squad/, conll2003/ and glue/")


def real_column(file: str, name: str, count: int | None = None) -> list[Any]:
    return pq.read_table(Path(FOLDER) / file).column(name).to_pylist()[:count]


# --- named entities -----------------------------------------------------------------------

Tags = list[list[str]]


def sentences(count: int, rng: random.Random) -> Tags:
    """Tags in IOB2, entities of one kind side by side among them."""
    out = []
    for _ in range(count):
        tags: list[str] = []
        while len(tags) < rng.randint(1, 25):
            kind = rng.choice(("PER", "ORG", "LOC", "MISC"))
            entity = [f"B-{kind}", *[f"I-{kind}"] * rng.randint(0, 3)]
            tags += entity if rng.random() < 0.4 else ["O"] * rng.randint(1, 4)
        out.append(tags)
    return out


def with_noise(true: Tags, rate: float, rng: random.Random) -> Tags:
    return [[rng.choice(TAG_NAMES) if rng.random() < rate else tag for tag in sentence] for sentence in true]


def compare_entities(true: Tags, predicted: Tags) -> dict[str, float]:
    lines = [
        line
        for right, ours in zip(true, predicted, strict=True)
        for line in (*(f"word {t} {p}" for t, p in zip(right, ours, strict=True)), "")
    ]
    scores = entity_scores(predicted, true)
    assert {name: value for name, value in scores.items() if name != "strict_f1"} == official.conlleval(lines)
    return scores


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.05, 0.1, 0.5, 1.0])
def test_entities_count_as_conlleval_counts_them(rate: float) -> None:
    rng = random.Random(int(rate * 100))
    true = sentences(300, rng)
    scores = compare_entities(true, with_noise(true, rate, rng))
    assert (scores["f1"] == 1.0) == (rate == 0.0)
    assert (scores["f1"] == scores["strict_f1"]) == (rate == 0.0)


@real
@pytest.mark.parametrize(("rate", "f1", "strict"), [(0.02, 0.914, 0.947), (0.05, 0.805, 0.871), (0.1, 0.663, 0.763)])
def test_entities_of_the_real_test_split(rate: float, f1: float, strict: float) -> None:
    true = [[TAG_NAMES[tag] for tag in row] for row in real_column("conll2003/test.parquet", "ner_tags")]
    scores = compare_entities(true, with_noise(true, rate, random.Random(0)))
    assert scores["f1"] == pytest.approx(f1, abs=0.01)
    assert scores["strict_f1"] == pytest.approx(strict, abs=0.01)


# --- answers ------------------------------------------------------------------------------

WORDS = (
    "the a an The A. of-the cat's cat Cat, dog 12 1,200 U.S. naïve “quoted” — été 東京 a\u0301 (the) an-a _ _x".split()
)


def phrase(rng: random.Random, most: int = 5) -> str:
    return rng.choice((" ", "  ", "\u00a0", "\t")).join(rng.choices(WORDS, k=rng.randint(1, most)))


MISTAKES: Sequence[Callable[[str, random.Random], str]] = (
    lambda answer, rng: answer,
    lambda answer, rng: answer.upper(),
    lambda answer, rng: f"The {answer}.",
    lambda answer, rng: " ".join(answer.split()[1:]),
    lambda answer, rng: " ".join(answer.split()[:-1]),
    lambda answer, rng: f"{phrase(rng)} {answer}",
    lambda answer, rng: f"{answer} {answer}",
    lambda answer, rng: " ".join(reversed(answer.split())),
    lambda answer, rng: answer.replace(" ", "-"),
    lambda answer, rng: phrase(rng),
    lambda answer, rng: rng.choice((".", "the", "")),
)


def made_up(count: int, rng: random.Random) -> list[list[str]]:
    return [[phrase(rng) for _ in range(rng.randint(1, 4))] for _ in range(count)]


def read_squad(count: int) -> list[list[str]]:
    return [found["text"] for found in real_column("squad/validation.parquet", "answers", count)]


def predict(true: list[list[str]], rng: random.Random) -> list[str]:
    return [rng.choice(MISTAKES)(rng.choice(answers) if answers else phrase(rng), rng) for answers in true]


def compare_or_none(true: list[list[str]], rng: random.Random, threshold: float) -> None:
    true = [[] if rng.random() < 0.4 else answers for answers in true]
    predicted = predict(true, rng)
    # Margins that tell a little, many of them equal.
    margins = [round(rng.gauss(-1.0 if answers else 1.0, 2.0), 1) for answers in true]
    ids = [f"q{row}" for row in range(len(true))]
    expected = official.squad_v2(
        *(dict(zip(ids, values, strict=True)) for values in (true, predicted, margins)), threshold=threshold
    )
    in_percent = {
        name: value * (1 if name.endswith("thresh") else 100)
        for name, value in score_or_none(predicted, true, margins, threshold).items()
    }
    assert in_percent == pytest.approx(expected, rel=EXACT, abs=EXACT)
    assert 0 < in_percent["exact"] < in_percent["f1"] < 100
    assert in_percent["best_f1"] > 100 * true.count([]) / len(true)


@pytest.mark.parametrize("source", [made_up, pytest.param(lambda count, rng: read_squad(count), marks=real)])
def test_answers_as_in_the_scripts(source: Callable[[int, random.Random], list[list[str]]]) -> None:
    rng = random.Random(0)
    true = source(600, rng)
    predicted = predict(true, rng)
    ids = [f"q{row}" for row in range(len(true))]
    expected = official.squad_v1(dict(zip(ids, true, strict=True)), dict(zip(ids, predicted, strict=True)))
    ours = {name: 100 * value for name, value in score_answers(predicted, true).items()}
    assert ours == pytest.approx(expected, rel=EXACT)
    assert 0 < ours["exact_match"] < ours["f1"] < 100
    for threshold in (-1.0, 0.0, 2.5):
        compare_or_none(true, rng, threshold)


def test_the_best_threshold_is_the_best_of_all() -> None:
    """Where margins differ, no threshold gives more than `best_f1`, and the one that is told gives just that."""
    rng = random.Random(1)
    true = [[] if rng.random() < 0.5 else answers for answers in made_up(60, rng)]
    predicted, margins = predict(true, rng), [rng.random() for _ in true]

    def at(threshold: float) -> float:
        return score_or_none(predicted, true, margins, threshold)["f1"]

    scores = score_or_none(predicted, true, margins, 0.0)
    assert scores["best_f1"] == pytest.approx(max(map(at, (-1.0, *margins))), rel=EXACT)
    assert at(scores["best_f1_thresh"]) == pytest.approx(scores["best_f1"], rel=EXACT)


# --- GLUE ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
@pytest.mark.parametrize(
    "file",
    [None, *(pytest.param(f"glue/{task}/validation.parquet", marks=real) for task in ("cola", "mrpc", "sst2"))],
)
def test_classes_as_glue_scores_them(file: str | None, rate: float) -> None:
    rng = random.Random(int(rate * 100))
    true = real_column(file, "label") if file else [int(rng.random() < 0.7) for _ in range(400)]
    logits = torch.randn(len(true), 2, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(len(true)), torch.tensor(true)] += 3 * (1 - rate)
    predicted = [int(right > wrong) for wrong, right in logits.tolist()]
    assert set(predicted) == {0, 1}
    for name in ("accuracy", "f1", "mcc"):
        ours = score(logits, torch.tensor(true), (name,))
        assert ours == {name: pytest.approx(getattr(official, name)(predicted, true), rel=EXACT)}


@pytest.mark.parametrize("digits", [1, 6])
def test_similarities_as_glue_scores_them(digits: int) -> None:
    """Ranks with ties, as human similarities and rounded predictions have them."""
    rng = random.Random(digits)
    true = [round(rng.uniform(0, 5), 1) for _ in range(400)]
    outputs = torch.tensor([[round(value + rng.gauss(0, 1), digits)] for value in true])
    for name in ("pearson", "spearman"):
        expected = getattr(official, name)(outputs[:, 0].double().tolist(), true)
        ours = score(outputs, torch.tensor(true, dtype=torch.float64), (name,))
        assert ours == {name: pytest.approx(expected, rel=1e-10)}
    assert {"accuracy", "f1", "mcc", "pearson", "spearman"} <= set(METRICS)


# --- written text -------------------------------------------------------------------------

ENGLISH = (
    "Don't panic: it's 3.14% o'clock, isn't it? snake_case co-operate CamelCase U.S.A. 1,000,000 $5 e-mail@host.org "
    "A/B x86_64 “quoted” ‘single’ rock’n’roll — dash… 20° £9 5½ m² ™ • → ❤️ 1️⃣"
).split()


@pytest.mark.parametrize("seed", range(20))
def test_english_has_the_tokens_of_the_reference_package(seed: int) -> None:
    from rouge_score import rouge_scorer, tokenizers

    rng = random.Random(seed)
    texts = [rng.choice((" ", "\n", "\t", "\u00a0", "")).join(rng.choices(ENGLISH, k=12)) for _ in range(20)]
    reference, ours = tokenizers.DefaultTokenizer(), UnicodeTokenizer()
    assert [ours.tokenize(text) for text in texts] == [reference.tokenize(text) for text in texts]
    assert not any(map(reads_more, texts))
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    expected = sum(
        scorer.score(right, text)["rougeL"].fmeasure for right, text in zip(texts[:10], texts[10:], strict=True)
    )
    assert 0 < expected < 10
    assert rouge_l(texts[10:], texts[:10]) == pytest.approx(expected / 10, rel=EXACT)


@real
def test_real_english_has_the_tokens_of_the_reference_package() -> None:
    from rouge_score import tokenizers

    texts = real_column("squad/validation.parquet", "context") + real_column(
        "glue/mrpc/validation.parquet", "sentence1"
    )
    ascii_only = [text for text in dict.fromkeys(texts) if text.isascii()]
    assert len(ascii_only) > 1000
    reference, ours = tokenizers.DefaultTokenizer(), UnicodeTokenizer()
    assert all(ours.tokenize(text) == reference.tokenize(text) for text in ascii_only)
