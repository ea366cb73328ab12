from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError, DataError
from dsprune.tasks import build_task, task_names
from dsprune.tasks.benchmarks.glue import GLUE, HUB_DATASET
from tests.tasks.conftest import Write

TEXT = ["the cat sat", "a dog", "the mat"]


def columns_of(name: str) -> dict[str, list[Any]]:
    facts = GLUE[name]
    texts: dict[str, list[Any]] = {column: list(TEXT) for column in facts.columns}
    return texts | {"label": [0, 1, 1] if facts.labels else [0.0, 2.5, 5.0], "idx": [0, 1, 2]}


def write_task(folder: Path, name: str, write: Write, **changed: list[Any]) -> Path:
    for split in ("train", *(split for _, split in GLUE[name].evals)):
        write(folder / f"{split}.jsonl", columns_of(name) | changed)
    return folder


def test_all_nine_tasks() -> None:
    assert set(task_names()) >= {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    for name, facts in GLUE.items():
        task = build_task(TaskConfig(name=name), DataConfig(), seed=0)
        assert task.num_labels == {"mnli": 3, "stsb": 1}.get(name, 2)
        assert task.problem == ("regression" if name == "stsb" else "classification")
        assert task.primary == facts.metrics[0]


def test_official_metrics() -> None:
    assert GLUE["cola"].metrics == ("mcc",)
    assert set(GLUE["mrpc"].metrics) == set(GLUE["qqp"].metrics) == {"f1", "accuracy"}
    assert GLUE["stsb"].metrics == ("pearson", "spearman")
    assert all(GLUE[name].metrics == ("accuracy",) for name in ("sst2", "mnli", "qnli", "rte", "wnli"))


@pytest.mark.parametrize("name", GLUE)
def test_every_task_loads_from_a_folder(
    name: str, tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build_task(TaskConfig(name=name), DataConfig(path=str(write_task(tmp_path, name, write))), seed=0)
    data = task.load(tokenizer)
    assert list(data.evals) == (["matched", "mismatched"] if name == "mnli" else ["validation"])
    assert data.notes == ()
    for encoded in (data.train, *data.evals.values()):
        batch = encoded.collate([0, 1, 2])
        segments = 2 if len(GLUE[name].columns) == 2 else 1
        assert (batch["input_ids"] == tokenizer.sep_token_id).sum(1).tolist() == [segments] * 3
        assert batch["token_type_ids"].max() == segments - 1
        assert batch["labels"].dtype == (torch.float32 if name == "stsb" else torch.int64)
        logits = torch.randn(3, task.num_labels, requires_grad=True)
        count = encoded.targets.sum()
        task.loss(logits, batch["labels"], count=count).backward()
        task.logit_loss(logits, logits.detach(), batch["labels"], temperature=2.0, count=count).backward()
        assert set(task.score(logits, encoded)) == set(GLUE[name].metrics)


def test_losses_are_sums_over_a_count() -> None:
    classify = build_task(TaskConfig(name="sst2"), DataConfig(), seed=0)
    loss = classify.loss(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]), count=torch.tensor(8.0))
    assert loss.item() == pytest.approx(math.log(2) / 2)
    regress = build_task(TaskConfig(name="stsb"), DataConfig(), seed=0)
    loss = regress.loss(torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0]), count=torch.tensor(2.0))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(2.5)


def test_logit_losses() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = log(4/3) / 2, of one example of two, times T^2."""
    labels, count = torch.tensor([0, 1]), torch.tensor(2.0)
    classify = build_task(TaskConfig(name="sst2"), DataConfig(), seed=0)
    student = torch.tensor([[0.0, 2 * math.log(3)], [1.0, 1.0]])
    loss = classify.logit_loss(student, torch.zeros(2, 2), labels, temperature=2.0, count=count)
    assert loss.item() == pytest.approx(2.0**2 * math.log(4 / 3) / 2 / 2)
    regress = build_task(TaskConfig(name="stsb"), DataConfig(), seed=0)
    loss = regress.logit_loss(torch.tensor([[1.0]]), torch.tensor([[4.0]]), labels[:1], temperature=2.0, count=count)
    assert loss.item() == pytest.approx(4.5)


def test_the_engine_reads_logits() -> None:
    task = build_task(TaskConfig(name="mnli"), DataConfig(), seed=0)
    assert task.head == "ForSequenceClassification"
    outputs = task.outputs(SimpleNamespace(logits=torch.tensor([[10.0, 20.0, 30.0]])))
    assert outputs.tolist() == [[10.0, 20.0, 30.0]]


def test_mnli_needs_both_evaluation_splits(tmp_path: Path, write: Write) -> None:
    (write_task(tmp_path, "mnli", write) / "validation_mismatched.jsonl").unlink()
    with pytest.raises(DataError, match="no file for split 'validation_mismatched'"):
        build_task(TaskConfig(name="mnli"), DataConfig(path=str(tmp_path)), seed=0)


def test_first_examples(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_task(tmp_path, "sst2", write)
    config = DataConfig(path=str(folder), max_train_examples=2, max_eval_examples=1)
    with caplog.at_level(logging.WARNING):
        data = build_task(TaskConfig(name="sst2"), config, seed=0).load(tokenizer)
    assert (len(data.train), len(data.evals["validation"])) == (2, 1)
    assert data.notes == ("train: the first 2 of 3 examples", "validation: the first 1 of 3 examples")
    assert "the first 2 of 3 examples" in caplog.text


def test_partial_files_are_never_called_official(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train_partial.parquet", columns_of("qqp"))
    write(tmp_path / "validation_heldout_partial.parquet", columns_of("qqp"))
    with caplog.at_level(logging.WARNING):
        data = build_task(TaskConfig(name="qqp"), DataConfig(path=str(tmp_path)), seed=0).load(tokenizer)
    assert list(data.evals) == ["validation_heldout_partial"]
    assert data.train.name == "train_partial"
    assert "train_partial.parquet is not the official train split" in caplog.text
    assert len(data.notes) == 2


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "sst2",
            {"label": [0, 1, -1]},
            r"train\.jsonl: row 2 \(from 0\), column 'label': expected one of negative, positive, or a number from 0 "
            r"to 1, found -1; the column holds -1, 0, 1$",
        ),
        ("sst2", {"label": [0, 2, 1]}, r"row 1 \(from 0\), column 'label': .* found 2; the column holds 0, 1, 2$"),
        (
            "mnli",
            {"label": [0, 3, 1]},
            r"one of entailment, neutral, contradiction, or a number from 0 to 2, found 3; ",
        ),
        ("sst2", {"label": [0, 1, 0.5]}, "found 0.5; the column holds 0, 0.5, 1$"),
        ("mnli", {"label": [0, 1, True]}, "found True; "),
        (
            "sst2",
            {"label": ["positive", "neutral", "negative"]},
            "found 'neutral'; the column holds negative, neutral, po",
        ),
        ("sst2", {"label": [0, 1, None]}, "found None; "),
        ("stsb", {"label": [0.0, True, 1.0]}, "row 1 .* expected a number from 0 to 5, found True$"),
        ("stsb", {"label": [0.0, float("nan"), 1.0]}, "row 1 .* expected a number from 0 to 5, found nan$"),
        ("stsb", {"label": [0.0, 5.5, 1.0]}, "found 5.5$"),
        ("stsb", {"label": [0.0, "high", 1.0]}, "found 'high'$"),
        ("sst2", {"sentence": ["the cat", None, "a dog"]}, "row 1 .*, column 'sentence': expected text, found None$"),
        ("mrpc", {"sentence2": ["a", "b", 7]}, "row 2 .*, column 'sentence2': expected text, found 7$"),
        ("sst2", {"sentence": [], "label": [], "idx": []}, r"train\.jsonl: the split is empty"),
    ],
)
def test_values_that_cannot_be(
    name: str,
    changed: dict[str, list[Any]],
    message: str,
    tmp_path: Path,
    write: Write,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task = build_task(TaskConfig(name=name), DataConfig(path=str(write_task(tmp_path, name, write, **changed))), seed=0)
    with pytest.raises(DataError, match=message) as caught:
        task.load(tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "labels", "wanted"),
    [
        ("sst2", ["positive", "negative", "Positive"], [1, 0, 1]),
        ("sst2", [1.0, 0.0, 1.0], [1, 0, 1]),
        ("sst2", [True, False, True], [1, 0, 1]),
        ("sst2", ["1", "0", "1.0"], [1, 0, 1]),
        ("sst2", ["LABEL_1", "LABEL_0", "LABEL_1"], [1, 0, 1]),
        ("rte", ["not_entailment", "entailment", "Not Entailment"], [1, 0, 1]),
        ("wnli", ["not_entailment", "entailment", 1], [0, 1, 1]),
        ("mnli", ["contradiction", "neutral", "entailment"], [2, 1, 0]),
        ("stsb", ["0.5", 3, "5"], [0.5, 3.0, 5.0]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_as_users_have_them(
    name: str,
    labels: list[Any],
    wanted: list[float],
    suffix: str,
    tmp_path: Path,
    write: Write,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for split in ("train", *(split for _, split in GLUE[name].evals)):
        write(tmp_path / f"{split}.{suffix}", columns_of(name) | {"label": labels})
    data = build_task(TaskConfig(name=name), DataConfig(path=str(tmp_path)), seed=0).load(tokenizer)
    assert data.train.labels.tolist() == wanted


def test_an_empty_split_is_refused(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "train.parquet", columns_of("sst2"))
    write(tmp_path / "validation.parquet", {"sentence": [], "label": []})
    task = build_task(TaskConfig(name="sst2"), DataConfig(path=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=r"validation\.parquet: the split is empty"):
        task.load(tokenizer)


def test_a_missing_column_names_what_is_there(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = write_task(tmp_path, "cola", write)  # one sentence, where MRPC has two
    task = build_task(TaskConfig(name="mrpc"), DataConfig(path=str(folder)), seed=0)
    with pytest.raises(
        DataError, match=r"train\.jsonl: no column 'sentence1' of task 'mrpc'; there is sentence, label"
    ):
        task.load(tokenizer)


def test_the_hub_by_default(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = []

    def load_dataset(path: str, name: str, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_dict(columns_of("mnli"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = build_task(TaskConfig(name="mnli"), DataConfig(revision="abc"), seed=0).load(tokenizer)
    assert sorted(asked) == [
        (HUB_DATASET, "mnli", split, "abc") for split in ("train", "validation_matched", "validation_mismatched")
    ]
    assert len(data.train) == len(data.evals["mismatched"]) == 3


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = build_task(TaskConfig(name="rte"), DataConfig(), seed=0)
    with pytest.raises(DataError, match=r"cannot get nyu-mll/glue \(rte, .*Couldn't reach the hub; .* data\.path$"):
        task.load(tokenizer)


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        (TaskConfig(name="sst-2"), DataConfig(), r"task.name = 'sst-2': no such task; did you mean 'sst2'\?"),
        (TaskConfig(name="imdb"), DataConfig(), "no such task; there are cola, sst2, "),
        (TaskConfig(name="sst2", metric="acuracy"), DataConfig(), "did you mean 'accuracy'"),
        (TaskConfig(name="cola", metric="f1"), DataConfig(), "task 'cola' has no such metric; it has mcc"),
        (TaskConfig(name="cola"), DataConfig(path="x", revision="y"), "data.revision pins"),
    ],
)
def test_settings_that_cannot_be(task: TaskConfig, data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(task, data, seed=0)


def test_the_metric_that_picks_the_best_can_be_chosen() -> None:
    task = build_task(TaskConfig(name="mrpc", metric="accuracy"), DataConfig(), seed=0)
    assert (task.primary, task.metrics) == ("accuracy", ("f1", "accuracy"))


def test_a_regression_student_learns_from_its_teacher() -> None:
    """A softmax over one logit is 1 whatever the logit: its divergence would be 0 for ever."""
    task = build_task(TaskConfig(name="stsb"), DataConfig(), seed=0)
    student = torch.zeros(4, 1, requires_grad=True)
    outputs = task.outputs(SimpleNamespace(logits=student))
    count = torch.tensor(4.0)
    task.logit_loss(outputs, torch.ones(4, 1), torch.zeros(4), temperature=2.0, count=count).backward()
    assert student.grad is not None
    assert student.grad.abs().min() > 0
