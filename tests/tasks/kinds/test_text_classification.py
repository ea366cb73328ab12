from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.engine.models.load import label_config
from dsprune.errors import ConfigError, DataError
from dsprune.tasks import Task, build_task
from tests.tasks.conftest import Write

Build = Callable[..., Task]

TEXTS = ["the cat sat", "a dog", "the mat", "on a mat"]


@pytest.fixture
def build(tmp_path: Path, write: Write) -> Build:
    """The task on columns, written as training and as validation split."""

    def build(
        columns: dict[str, list[Any]],
        validation: dict[str, list[Any]] | None = None,
        *,
        data: dict[str, Any] | None = None,
        suffix: str = "jsonl",
        **task: Any,
    ) -> Task:
        folder = tmp_path / suffix
        write(folder / f"train.{suffix}", columns)
        write(folder / f"validation.{suffix}", validation or columns)
        settings = DataConfig(path=str(folder), **(data or {}))
        return build_task(TaskConfig(name="text_classification", **task), settings, seed=0)

    return build


def with_labels(*labels: Any) -> dict[str, list[Any]]:
    return {"text": TEXTS[: len(labels)], "label": list(labels)}


# --- labels that are found ----------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["spam", "ham", "spam", "ham"], ("ham", "spam"), [1, 0, 1, 0]),
        ([10, 9, 2, 10], ("2", "9", "10"), [2, 1, 0, 2]),
        ([1.0, 0.0, 0.0, 1.0], ("0", "1"), [1, 0, 0, 1]),
        ([True, False, False, True], ("False", "True"), [1, 0, 0, 1]),
        ([-1, 0, 1, -1], ("-1", "0", "1"), [0, 1, 2, 0]),
    ],
)
def test_labels_are_found_in_the_training_examples(
    build: Build,
    tokenizer: PreTrainedTokenizerFast,
    suffix: str,
    labels: list[Any],
    names: tuple[str, ...],
    ids: list[int],
) -> None:
    task = build(with_labels(*labels), suffix=suffix)
    assert (task.labels, task.problem, task.num_labels) == (names, "classification", len(names))
    data = task.load(tokenizer)
    assert data.train.labels.tolist() == data.evals["validation"].labels.tolist() == ids
    assert data.notes == ()
    config = label_config(task)
    assert config["id2label"] == dict(enumerate(names))
    assert config["problem_type"] == "single_label_classification"


def test_the_order_of_the_examples_does_not_matter(build: Build) -> None:
    assert build(with_labels("b", "c", "a")).labels == build(with_labels("c", "a", "b")).labels == ("a", "b", "c")


def test_labels_are_found_beyond_the_first_examples(build: Build) -> None:
    task = build(with_labels("a", "b", "c", "d"), data={"max_train_examples": 1})
    assert task.labels == ("a", "b", "c", "d")


def test_given_labels_are_named_or_counted(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    names = ("positive", "negative")
    for column in (["negative", "Positive", "positive"], [1, 0, 0], ["1", "0.0", "positive"], [True, False, False]):
        task = build(with_labels(*column), labels=names)
        assert task.labels == names
        assert task.load(tokenizer).train.labels.tolist() == [1, 0, 0]


def test_a_data_set_that_names_its_classes(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["world", "sports", "business"])}
        )
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = DataConfig(dataset="someone/news", subset="en", evals=("test", "dev"), revision="abc")
    task = build_task(TaskConfig(name="text_classification"), settings, seed=0)
    assert task.labels == ("world", "sports", "business")
    assert asked == [("someone/news", "en", "train", "abc")]
    data = task.load(tokenizer)
    assert data.train.labels.tolist() == [1, 0]
    assert list(data.evals) == ["test", "dev"]
    assert len(asked) == 3


def test_a_share_of_the_training_examples_is_held_out(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    write(tmp_path / "train.csv", with_labels("a", "b", "a", "b"))
    settings = DataConfig(path=str(tmp_path), validation_share=0.25)
    data = build_task(TaskConfig(name="text_classification"), settings, seed=0).load(tokenizer)
    assert (len(data.train), {name: len(split) for name, split in data.evals.items()}) == (3, {"heldout": 1})
    assert data.notes == ("heldout: 1 of the 4 examples of train, not trained on",)


# --- texts --------------------------------------------------------------------------------


def test_pairs_of_texts(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = with_labels("yes", "no") | {"text_pair": ["the dog", "a mat"]}
    batch = build(rows).load(tokenizer).train.collate([0, 1])
    assert (batch["input_ids"] == tokenizer.sep_token_id).sum(1).tolist() == [2, 2]
    single = build(with_labels("yes", "no")).load(tokenizer).train.collate([0, 1])
    assert (single["input_ids"] == tokenizer.sep_token_id).sum(1).tolist() == [1, 1]


def test_columns_by_choice(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {"premise": TEXTS[:2], "hypothesis": TEXTS[2:], "gold": ["x", "y"], "label": [7, 7], "text": ["no", "no"]}
    columns = {"text": "premise", "text_pair": "hypothesis", "label": "gold"}
    task = build(rows, data={"columns": columns})
    assert task.labels == ("x", "y")
    batch = task.load(tokenizer).train.collate([0])
    assert batch["input_ids"][0].tolist() == tokenizer(TEXTS[0], TEXTS[2])["input_ids"]


def test_blank_texts_are_told_of(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {"text": ["a", " ", ""], "label": ["x", "y", "x"]}
    data = build(rows, with_labels("x", "y")).load(tokenizer)
    assert data.notes == ("train: 2 of 3 rows have a blank 'text', the first is row 1 (from 0)",)


# --- problems and metrics -----------------------------------------------------------------


def test_numbers_that_are_not_whole_are_a_regression(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    for suffix in ("csv", "jsonl"):
        task = build(with_labels(1.0, 2.5, 4.0), suffix=suffix)
        assert (task.problem, task.labels, task.metrics) == ("regression", (), ("pearson", "spearman"))
        data = task.load(tokenizer)
        assert (data.train.labels.dtype, data.train.labels.tolist()) == (torch.float32, [1.0, 2.5, 4.0])
        assert label_config(task)["problem_type"] == "regression"
        scores = task.score(torch.tensor([[0.1], [0.2], [0.4]]), data.train)
        assert scores["spearman"] == pytest.approx(1.0)


def test_what_numbers_are_can_be_said(build: Build) -> None:
    assert build(with_labels(1, 2, 3), problem="regression").problem == "regression"
    task = build(with_labels(0.5, 1.0, 0.5), problem="classification")
    assert (task.problem, task.labels) == ("classification", ("0.5", "1"))


@pytest.mark.parametrize(
    ("labels", "settings", "metrics"),
    [
        (["a", "b"], {}, ("accuracy", "f1", "macro_f1", "mcc")),
        (["a", "b", "c"], {}, ("accuracy", "macro_f1", "mcc")),
        ([0.5, 1.5], {}, ("pearson", "spearman")),
        (["a", "a,b"], {"multi_label": True}, ("micro_f1", "macro_f1")),
    ],
)
def test_metrics_by_choice(build: Build, labels: list[Any], settings: dict[str, Any], metrics: tuple[str, ...]) -> None:
    for metric in metrics:
        assert build(with_labels(*labels), metric=metric, **settings).primary == metric
    task = build(with_labels(*labels), **settings)
    assert (task.metrics, task.primary) == (metrics, metrics[0])
    with pytest.raises(ConfigError, match="task 'text_classification' has no such metric"):
        build(with_labels(*labels), metric="bleu", **settings)


def test_f1_is_of_the_second_label(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    task = build(with_labels("ham", "spam", "spam", "ham"))
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])  # spam, spam, ham, ham
    scores = task.score(logits, task.load(tokenizer).train)
    assert scores["f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))
    assert scores["accuracy"] == scores["macro_f1"] == 0.5


# --- several labels -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "settings"),
    [
        ([["red", "big"], [], ["big"]], {}),
        (["red,big", "", "big"], {}),
        (["red, big", " ", "big,"], {}),
        (["red|big", "", "big"], {"label_separator": "|"}),
        (["['red', 'big']", "[]", '["big"]'], {}),
    ],
)
def test_several_labels_a_text(
    build: Build, tokenizer: PreTrainedTokenizerFast, cells: list[Any], settings: dict[str, Any]
) -> None:
    task = build(with_labels(*cells), multi_label=True, **settings)
    assert (task.labels, task.problem, task.num_labels) == (("big", "red"), "multi_label", 2)
    data = task.load(tokenizer)
    assert data.train.labels.dtype == torch.float32
    assert data.train.collate([0, 1, 2])["labels"].tolist() == [[1, 1], [0, 0], [1, 0]]
    assert data.train.targets.tolist() == [1, 1, 1]
    config = label_config(task)
    assert (config["problem_type"], config["id2label"]) == ("multi_label_classification", {0: "big", 1: "red"})


def test_several_labels_by_number(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    task = build(with_labels([2, 7], [7], []), multi_label=True)
    assert task.labels == ("2", "7")
    assert task.load(tokenizer).train.labels.tolist() == [[1, 1], [0, 1], [0, 0]]
    named = build(with_labels([0, 1], ["b"], []), multi_label=True, labels=("a", "b"))
    assert named.load(tokenizer).train.labels.tolist() == [[1, 1], [0, 1], [0, 0]]


def test_the_loss_of_several_labels_is_that_of_transformers(build: Build) -> None:
    task = build(with_labels(["a"], ["b", "c"]), multi_label=True)
    logits, labels = torch.randn(5, 3), (torch.rand(5, 3) > 0.5).float()
    loss = task.loss(logits, labels, count=torch.tensor(5.0))
    assert loss.item() == pytest.approx(torch.nn.BCEWithLogitsLoss()(logits, labels).item(), rel=1e-6)
    parts = [task.loss(logits[rows], labels[rows], count=torch.tensor(5.0)) for rows in ([0], [1, 2, 3, 4])]
    assert sum(parts).item() == pytest.approx(loss.item(), rel=1e-6)


def test_distillation_of_several_labels_by_hand(build: Build) -> None:
    """T^2 * sum over the outcomes on and off of t * log(t / s), mean over labels."""
    task = build(with_labels(["a"], ["b"]), multi_label=True)
    student, teacher, temperature = torch.tensor([[0.3, -4.0]]), torch.tensor([[-1.2, 2.0]]), 2.0
    wanted = 0.0
    for s, t in zip(student[0].tolist(), teacher[0].tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-x / temperature)) for x in (t, s))
        wanted += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    got = task.logit_loss(student, teacher, torch.zeros(1, 2), temperature=temperature, count=torch.tensor(4.0))
    assert got.item() == pytest.approx(temperature**2 * wanted / 2 / 4, rel=1e-5)
    far = torch.full((1, 2), 1e4, requires_grad=True)
    loss = task.logit_loss(far, -far.detach(), torch.zeros(1, 2), temperature=1.0, count=torch.tensor(1.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()
    same = task.logit_loss(teacher, teacher, torch.zeros(1, 2), temperature=1.0, count=torch.tensor(1.0))
    assert same.item() == pytest.approx(0.0, abs=1e-6)


def test_metrics_of_several_labels(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    task = build(with_labels(["a"], ["a", "b"], [], ["c"]), multi_label=True)
    split = task.load(tokenizer).train
    logits = torch.tensor([[2.0, -1, -1], [1, -1, 0.5], [-1, -1, -1], [-3, -2, 1]])
    said = [[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]
    tp, fp, fn = 3, 1, 1
    scores = task.score(logits, split)
    assert scores["micro_f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert scores["macro_f1"] == pytest.approx((1.0 + 0.0 + 2 / 3) / 3)
    assert scores["macro_f1"] == pytest.approx(f1_score(split.labels.numpy(), said, average="macro", zero_division=0))
    assert task.outputs(SimpleNamespace(logits=logits)) is logits


# --- what cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        (
            {"review": ["a"], "label": ["x"]},
            {},
            r"no column 'text' of task .*; there is review, label; if it is one of",
        ),
        ({"text": ["a"], "stars": ["x"]}, {}, r"no column 'label' .*say data.columns = \{label = \"ITS NAME\"\}$"),
        (with_labels("x", "x"), {}, r"train.jsonl: column 'label' holds one label alone, x$"),
        (with_labels([], []), {"multi_label": True}, "column 'label' holds no label$"),
        (with_labels("x", None), {}, r"train.jsonl: row 1 \(from 0\), column 'label': expected a label, found None$"),
        (with_labels("x", ""), {}, r"row 1 .*expected a label, found ''$"),
        (with_labels("x", ["y"]), {}, r"row 1 .*expected a label, found \['y'\]$"),
        (with_labels("x", "X"), {}, r"train.jsonl: labels 'X' and 'x' differ in case"),
        (
            with_labels(["x"], None),
            {"multi_label": True},
            r"row 1 .*expected a list of labels, \[\] for none, found None$",
        ),
        (with_labels(["x"], [None]), {"multi_label": True}, r"row 1 .*expected a list of labels, .*found \[None\]$"),
        (
            {"text": ["a"] * 50, "label": [f"text {i}" for i in range(50)]},
            {},
            r"column 'label' holds 50 different labels in 50 rows \(text 0, .* and 38 more\): if .* task.labels; if",
        ),
        ({"text": [], "label": []}, {}, "the split is empty"),
    ],
)
def test_training_examples_that_cannot_be(
    build: Build, rows: dict[str, list[Any]], task: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build(rows, **task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "validation", "task", "message"),
    [
        (
            with_labels("ham", "spam"),
            with_labels("ham", "eggs"),
            {},
            r"validation.jsonl: row 1 \(from 0\), column 'label': expected one of ham, spam, or a number from 0 to 1, "
            r"found 'eggs'; the column holds eggs, ham$",
        ),
        (with_labels(1, 2), with_labels(1, 0), {}, r"expected one of 1, 2, found 0; the column holds 0, 1$"),
        (with_labels("x", "y"), with_labels("x", "z"), {"labels": ("x", "y")}, r"found 'z'; the column holds x, z$"),
        (
            with_labels(["a"], ["b"]),
            with_labels(["a"], ["a", "c"]),
            {"multi_label": True},
            r"row 1 .*expected one of a, b, .*, or several, found \['a', 'c'\]; the column holds a, c$",
        ),
        (with_labels(0.5, 1.5), with_labels(0.5, "high"), {}, r"row 1 .*'label': expected a number, found 'high'$"),
        (with_labels(0.5, 1.5), with_labels(0.5, float("nan")), {}, "expected a number, found nan$"),
        (with_labels("x", "y") | {"text_pair": ["a", "b"]}, with_labels("x", "y"), {}, "no column 'text_pair'"),
        ({"text": ["a", None], "label": ["x", "y"]}, None, {}, r"row 1 .*column 'text': expected text, found None$"),
    ],
)
def test_values_that_cannot_be(
    build: Build,
    tokenizer: PreTrainedTokenizerFast,
    train: dict[str, list[Any]],
    validation: dict[str, list[Any]] | None,
    task: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build(train, validation, **task).load(tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        (
            {},
            {},
            "task 'text_classification' has no data set of its own: give data.dataset, or a local folder as data.path",
        ),
        ({}, {"subset": "x"}, "data.subset = 'x': of which data set"),
        ({"multi_label": True, "problem": "regression"}, {}, "task.multi_label = true and task.problem = 'regression'"),
        ({"labels": ("a", "b"), "problem": "regression"}, {}, "the numbers of a regression have no names"),
        ({"labels": ("a", "a")}, {}, "task.labels: 'a' is named twice"),
        ({"labels": ("a",)}, {}, r"task.labels = \['a'\]: name at least 2"),
        (
            {"name": "sst2", "labels": ("a", "b")},
            {},
            "task.labels: for tasks text_classification, token_classification only",
        ),
        (
            {"name": "conll2003", "multi_label": True},
            {},
            "task.multi_label: for task text_classification only, and not for 'conll2003'",
        ),
    ],
)
def test_settings_that_cannot_be(task: dict[str, Any], data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(TaskConfig(**{"name": "text_classification", **task}), DataConfig(**data), seed=0)


def test_json_of_one_object_for_all_splits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {name: [{"text": "a", "label": name}, {"text": "b", "label": "x"}] for name in ("train", "validation")}
    rows["validation"][0]["label"] = "train"
    for name in rows:
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1))
    task = build_task(TaskConfig(name="text_classification"), DataConfig(path=str(tmp_path)), seed=0)
    assert task.labels == ("train", "x")
    assert len(task.load(tokenizer).evals["validation"]) == 2
