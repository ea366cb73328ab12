from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ArchitectureError, ConfigError, DataError, NumericsError
from dsprune.tasks import TaskData, batching, build_task
from dsprune.tasks.kinds.spans import NO_SPAN, SpanTask, Windows, locate
from dsprune.tasks.losses import ENDS, IGNORED, STARTS
from tests.tasks.conftest import Write

CONTEXT = "the cat sat on a mat and the dog ran"
LONG = " ".join([CONTEXT] * 5 + ["cat ran"])
"""52 words; only the last two are `cat ran`."""

Columns = dict[str, list[Any]]


def answer(context: str, *texts: str) -> dict[str, list[Any]]:
    return {"text": list(texts), "answer_start": [context.index(text) for text in texts]}


def columns(*rows: tuple[str, str, dict[str, list[Any]]]) -> Columns:
    """Questions, contexts and answers as columns, with ids q0, q1, ..."""
    questions, contexts, answers = map(list, zip(*rows, strict=True))
    ids = [f"q{row}" for row in range(len(rows))]
    return {"id": ids, "title": [""] * len(ids), "context": contexts, "question": questions, "answers": answers}


SHORT = columns(
    ("cat sat", CONTEXT, answer(CONTEXT, "a mat", "mat")),
    ("dog", CONTEXT, answer(CONTEXT, "the dog ran")),
    ("mat and a cat", "a dog sat", answer("a dog sat", "dog")),
)
SPLIT = columns(("cat sat", LONG, answer(LONG, "cat ran")), ("dog", CONTEXT, answer(CONTEXT, "the cat")))


def build(folder: Path, write: Write, data: Columns, *, train: Columns | None = None, **settings: Any) -> SpanTask:
    write(folder / "train.parquet", data if train is None else train)
    write(folder / "validation.parquet", data)
    config = {"name": "squad", "max_length": 64, "stride": 8} | settings
    task = build_task(TaskConfig(**config), DataConfig(path=str(folder)), seed=0)
    assert isinstance(task, SpanTask)
    return task


def validation(data: TaskData) -> Windows:
    split = data.evals["validation"]
    assert isinstance(split, Windows)
    return split


def certain(split: Windows, width: int) -> Tensor:
    """Outputs that give every feature's label."""
    labels = split.collate(range(len(split)))["labels"]
    outputs = torch.zeros(len(split), width, 2)
    for side, bit in enumerate((STARTS, ENDS)):
        outputs[:, : labels.shape[1], side] = 10.0 * ((labels != IGNORED) & (labels & bit).bool())
    return outputs


# --- features -----------------------------------------------------------------------------


def test_what_the_engine_asks(tmp_path: Path, write: Write) -> None:
    task = build(tmp_path, write, SHORT)
    assert (task.problem, task.head, task.labels, task.num_labels) == ("spans", "ForQuestionAnswering", (), 2)
    assert (task.primary, task.metrics) == ("f1", ("f1", "exact_match"))
    start, end = torch.randn(2, 3, 7)
    outputs = task.outputs(SimpleNamespace(start_logits=start, end_logits=end))
    assert outputs.shape == (3, 7, 2)
    assert torch.equal(outputs[..., 0], start)
    assert torch.equal(outputs[..., 1], end)


def test_the_question_stands_first(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = build(tmp_path, write, SHORT).load(tokenizer)
    batch = data.train.collate([0, 2])
    expected = tokenizer(["cat sat", "mat and a cat"], [CONTEXT, "a dog sat"], padding=True, return_tensors="pt")
    assert set(batch) == {*expected, "labels"}
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    # [CLS] cat sat [SEP] the cat sat on a mat and ...
    assert batch["labels"][0].tolist() == [0] * 8 + [STARTS, ENDS] + [0] * 5
    # [CLS] mat and a cat [SEP] a dog sat [SEP]
    assert batch["labels"][1].tolist() == [0] * 7 + [STARTS | ENDS] + [0] * 2 + [IGNORED] * 5
    assert data.train.targets.tolist() == [1, 1, 1]


def test_long_contexts_become_windows(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    split = validation(build(tmp_path, write, SPLIT, max_length=25, stride=6).load(tokenizer))
    # 25 - [CLS] cat sat [SEP] [SEP] = 20 words of context, of which 14 are new in each window.
    assert split.question_of.tolist() == [0, 0, 0, 0, 1]
    assert split.lengths.tolist() == [25, 25, 25, 15, 14]
    words = LONG.split()
    for window, start in enumerate((0, 14, 28, 42)):
        shown = tokenizer.convert_ids_to_tokens(split.collate([window])["input_ids"][0])
        assert shown == ["[CLS]", "cat", "sat", "[SEP]", *words[start : start + 20], "[SEP]"]
    labels = split.collate([0, 1, 2, 3])["labels"]
    assert labels[:3, 0].tolist() == [STARTS | ENDS] * 3  # without the answer: [CLS]
    assert (labels[:3, 1:] == 0).all()
    assert labels[3, 12:14].tolist() == [STARTS, ENDS]
    assert len(split.questions.ids) == 2


def test_chunks_are_joined(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build(tmp_path, write, SPLIT, max_length=25, stride=6)
    whole = validation(task.load(tokenizer))
    monkeypatch.setattr(batching, "CHUNK", 1)
    chunked = validation(task.load(tokenizer))
    assert torch.equal(whole.question_of, chunked.question_of)
    assert torch.equal(whole.offsets, chunked.offsets)
    for name, tensor in whole.collate(range(5)).items():
        assert torch.equal(tensor, chunked.collate(range(5))[name])


@pytest.mark.parametrize(
    ("characters", "tokens"),
    [
        ((0, 3), (1, 1)),
        ((0, 7), (1, 2)),
        ((5, 6), (2, 2)),  # inside a word: the whole of it
        ((2, 9), (1, 3)),
        ((0, 12), NO_SPAN),  # past the window
        ((3, 4), NO_SPAN),  # only the space between two words
    ],
)
def test_tokens_of_characters(characters: tuple[int, int], tokens: tuple[int, int]) -> None:
    offsets = np.array([[0, 0], [0, 3], [4, 7], [8, 11], [0, 0]])
    assert locate(offsets, *characters) == tokens


def test_an_answer_that_begins_before_the_window_is_not_in_it() -> None:
    offsets = np.array([[0, 0], [4, 7], [8, 11]])
    assert locate(offsets, 0, 7) == NO_SPAN
    assert locate(offsets, 4, 11) == (1, 2)
    assert locate(np.zeros((3, 2), dtype=np.int64), 0, 1) == NO_SPAN


def test_pieces_and_space_around_an_answer(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    context = "in 1960s, a  cat"
    data = columns(("when", context, answer(context, " 1960s,")), ("what", context, answer(context, "  cat")))
    task = build(tmp_path, write, data)
    split = validation(task.load(speller))
    assert task.answers(certain(split, 64), split) == {"q0": "1960s,", "q1": "cat"}


def test_equal_contexts_are_kept_once(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    contexts = validation(build(tmp_path, write, SHORT).load(tokenizer)).questions.contexts
    assert contexts[0] is contexts[1]


# --- answers ------------------------------------------------------------------------------


def test_certain_outputs_give_the_answers(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, SHORT)
    split = validation(task.load(tokenizer))
    outputs = certain(split, task.max_length)
    assert task.answers(outputs, split) == {"q0": "a mat", "q1": "the dog ran", "q2": "dog"}
    assert task.score(outputs, split) == {"f1": 1.0, "exact_match": 1.0}
    assert task.score(torch.zeros_like(outputs), split)["exact_match"] == 0.0


def test_what_stands_past_the_features_does_not_matter(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, write, SHORT)
    split = validation(task.load(tokenizer))
    outputs = certain(split, task.max_length)
    outputs[torch.arange(task.max_length) >= split.lengths[:, None]] = 1e3
    assert task.score(outputs, split) == {"f1": 1.0, "exact_match": 1.0}


def test_answers_come_from_the_context_alone(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, SHORT)
    split = validation(task.load(tokenizer))
    outputs = certain(split, task.max_length)
    outputs[:, :4] += 100.0  # [CLS] and the question, the first word of one context included
    outputs[1, 3] -= 100.0
    assert task.answers(outputs, split)["q0"] == "a mat"
    assert task.answers(outputs, split)["q2"] == "dog"


def test_the_best_span_over_all_windows_of_a_question(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, write, SPLIT, max_length=25, stride=6)
    split = validation(task.load(tokenizer))
    outputs = torch.zeros(5, 25, 2)
    outputs[1, 4, 0] = outputs[1, 5, 1] = 3.0  # words 14 and 15 of the context: "a mat"
    outputs[3, 12, 0] = outputs[3, 13, 1] = 2.0  # "cat ran"
    outputs[4, 3, 0] = outputs[4, 3, 1] = 1.0
    assert task.answers(outputs, split) == {"q0": "a mat", "q1": "the"}
    outputs[3] *= 2
    assert task.answers(outputs, split) == {"q0": "cat ran", "q1": "the"}
    # A single logit decides less than the sum of both.
    outputs[2, 8, 0] = 7.0
    assert task.answers(outputs, split)["q0"] == "cat ran"


def test_the_longest_answer(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    outputs = torch.zeros(3, 64, 2)
    outputs[0, 4, 0] = outputs[0, 6, 1] = 5.0
    for longest, given in ((3, "the cat sat"), (2, "the")):
        task = build(tmp_path, write, SHORT, max_answer_length=longest)
        assert task.answers(outputs, validation(task.load(tokenizer)))["q0"].startswith(given)
        assert len(task.answers(outputs, validation(task.load(tokenizer)))["q0"].split()) <= longest


def test_outputs_that_are_not_finite_are_refused(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, write, SHORT)
    outputs = torch.zeros(3, 64, 2)
    outputs[1, 5, 1] = torch.nan
    with pytest.raises(NumericsError, match="1 of 3 examples are not finite"):
        task.score(outputs, validation(task.load(tokenizer)))


# --- version 2 ----------------------------------------------------------------------------

V2 = columns(
    ("cat sat", LONG, answer(LONG, "cat ran")),
    ("dog", CONTEXT, {"text": [], "answer_start": []}),
    ("and", CONTEXT, answer(CONTEXT, "the dog")),
)


def test_questions_without_answer_point_at_the_first_token(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, write, V2, name="squad_v2", max_length=25, stride=6)
    split = validation(task.load(tokenizer))
    parts = ("HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact")
    assert task.metrics == ("f1", "exact", *parts, "best_f1", "best_exact")
    labels = split.collate([4])["labels"][0]
    assert labels.tolist() == [STARTS | ENDS] + [0] * 12 + [0]
    outputs = certain(split, 25)
    outputs[:3] = 0.0  # windows without the answer would otherwise say no answer, but the last one does not
    assert task.answers(outputs, split) == {"q0": "cat ran", "q1": "", "q2": "the dog"}
    scores = task.score(outputs, split)
    # q0 and q2 are answered with 20 where none has 0, q1 is not: no margin but -20 is needed to be right throughout.
    thresholds = {"best_f1_thresh": -20.0, "best_exact_thresh": -20.0}
    assert scores == dict.fromkeys(task.metrics, 1.0) | thresholds


def test_no_answer_takes_all_windows(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, V2, name="squad_v2", max_length=25, stride=6)
    split = validation(task.load(tokenizer))
    outputs = torch.zeros(6, 25, 2)
    outputs[:4, 0] = 5.0
    outputs[3, 12, 0] = outputs[3, 13, 1] = 4.0
    assert task.answers(outputs, split)["q0"] == ""
    outputs[2, 0] = 3.0  # one window that is less sure: the least of all is what counts
    assert task.answers(outputs, split)["q0"] == "cat ran"


@pytest.mark.parametrize(("threshold", "given"), [(-1.0, ""), (0.0, "the dog"), (1.9, "the dog")])
def test_the_threshold_of_no_answer(
    threshold: float, given: str, tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The threshold has to be exceeded: at equal scores and threshold 0 there is an answer."""
    task = build(tmp_path, write, V2, name="squad_v2", null_threshold=threshold)
    split = validation(task.load(tokenizer))
    outputs = torch.zeros(3, 64, 2)
    outputs[2, 0] = 2.0
    # [CLS] and [SEP] the cat sat on a mat and the dog ran
    outputs[2, 10, 0] = outputs[2, 11, 1] = 2.0
    assert task.answers(outputs, split)["q2"] == given
    outputs[2, 0] += max(threshold, 0.0) / 2 + 0.1
    assert task.answers(outputs, split)["q2"] == ""


def test_version_1_always_answers(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, SHORT)
    outputs = torch.zeros(3, 64, 2)
    outputs[:, 0] = 100.0
    assert all(task.answers(outputs, validation(task.load(tokenizer))).values())


@pytest.mark.parametrize(("metric", "kept"), [("NoAns_f1", [0, 2]), ("HasAns_exact", [1])])
def test_a_metric_without_questions_to_measure_it_on(
    metric: str, kept: list[int], tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = {name: [values[row] for row in kept] for name, values in V2.items()}
    # jsonl: a parquet column of nothing but empty lists has no type
    write(tmp_path / "train.jsonl", V2)
    write(tmp_path / "validation.jsonl", data)
    task = build_task(
        TaskConfig(name="squad_v2", metric=metric, max_length=64, stride=8), DataConfig(path=str(tmp_path)), seed=0
    )
    with pytest.raises(DataError, match=rf"validation.jsonl: has no questions that task.metric = '{metric}'"):
        task.load(tokenizer)


# --- losses -------------------------------------------------------------------------------


def test_unequal_micro_batches_add_up(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, SPLIT, max_length=25, stride=6)
    split = task.load(tokenizer).train
    student, teacher = torch.randn(2, 5, 25, 2, generator=torch.Generator().manual_seed(0))
    count = split.targets.sum() / 2

    def losses(rows: list[int]) -> Tensor:
        labels = split.collate(rows)["labels"]
        ours, theirs = student[rows, : labels.shape[1]], teacher[rows, : labels.shape[1]]
        return torch.stack(
            [
                task.loss(ours, labels, count=count),
                task.logit_loss(ours, theirs, labels, temperature=2.0, count=count),
            ]
        )

    whole = losses([0, 1, 2, 3, 4])
    assert torch.allclose(losses([4]) + losses([0, 3, 2, 1]), whole)
    assert torch.allclose(losses([4, 3]) + losses([2]) + losses([1, 0]), whole)
    assert (whole > 0.1).all()


# --- sources and mistakes -----------------------------------------------------------------


def test_the_hub_by_default(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_dict(SHORT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("squad", "squad_v2"):
        data = build_task(TaskConfig(name=name, max_length=64, stride=8), DataConfig(), seed=0).load(tokenizer)
        assert (len(data.train), len(validation(data))) == (3, 3)
    assert asked == [
        (f"rajpurkar/{name}", None, split, None) for name in ("squad", "squad_v2") for split in ("validation", "train")
    ]


def test_partial_files_are_never_called_official(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    write(tmp_path / "squad" / "train_partial.parquet", SHORT)
    write(tmp_path / "squad" / "validation.parquet", SHORT)
    task = build_task(TaskConfig(name="squad", max_length=64, stride=8), DataConfig(path=str(tmp_path)), seed=0)
    data = task.load(tokenizer)
    assert (data.train.name, list(data.evals)) == ("train_partial", ["validation"])
    assert data.notes == ("train_partial: train_partial.parquet is not the official train split",)


def test_a_few_misplaced_answers_are_left_out(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [("cat", CONTEXT, answer(CONTEXT, "mat"))] * 200
    good = columns(*rows)
    rows[150] = rows[7] = ("cat", CONTEXT, {"text": ["mat"], "answer_start": [3]})
    data = build(tmp_path, write, good, train=columns(*rows)).load(tokenizer)
    assert isinstance(data.train, Windows)
    assert len(data.train) == len(data.train.questions.ids) == 198
    assert not {"q7", "q150"} & set(data.train.questions.ids)
    assert data.notes == (
        "train: 2 of 200 examples have an answer that is not at its answer_start (first: 'q7'); they are left out",
    )
    rows[3] = rows[7]
    with pytest.raises(DataError, match=r"train\.parquet: 3 of 200 examples .* answer_start \(first: 'q3'\)$"):
        build(tmp_path, write, good, train=columns(*rows)).load(tokenizer)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answers": [{"text": ["a mat"], "answer_start": [-1]}] * 3}, "3 of 3 examples have an answer that is not at"),
        ({"answers": [{"text": ["  "], "answer_start": [3]}] * 3}, "3 of 3 examples have an answer that is not at"),
        ({"answers": [{"text": [], "answer_start": []}] * 3}, r"row 0 \(from 0\), column 'answers': .*at least one"),
        ({"answers": [{"text": ["a", "b"], "answer_start": [1]}] * 3}, "row 0 .*'answers': .* of equal length"),
        ({"answers": [{"text": ["a"], "answer_start": ["1"]}] * 3}, "row 0 .*'answers': expected"),
        ({"answers": [{"text": [7], "answer_start": [1]}] * 3}, "row 0 .*'answers': expected"),
        ({"answers": [{"text": ["a"]}] * 3}, "row 0 .*'answers': expected"),
        ({"answers": ["a mat"] * 3}, "row 0 .*'answers': expected {text:"),
        ({"question": ["a", None, "b"]}, "row 1 .*'question': expected text, found None"),
        ({"context": ["a", "b", 7]}, "row 2 .*'context': expected text, found 7"),
        ({"id": ["q0", "q1", "q0"]}, "row 2 .*'id': expected an id of its own, found 'q0'"),
        ({name: [] for name in SHORT}, "the split is empty"),
        (
            {"question": ["cat", "dog", "cat " * 53]},
            "the question of 'q2' has 53 tokens, beside which task.max_length = 64 leaves 8 for the context: "
            "windows need more than task.stride = 8",
        ),
        ({"question": ["cat", "dog", "cat " * 70]}, "'q2' has 70 tokens, .* leaves 0 for"),
    ],
)
def test_values_that_cannot_be(
    changed: Columns, message: str, tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    write(tmp_path / "train.jsonl", SHORT | changed)
    write(tmp_path / "validation.jsonl", SHORT)
    task = build_task(TaskConfig(name="squad", max_length=64, stride=8), DataConfig(path=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=message) as caught:
        task.load(tokenizer)
    assert "train.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_question_just_short_enough(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = columns(("cat " * 52, LONG, answer(LONG, "cat ran")))
    task = build(tmp_path, write, data)
    split = validation(task.load(tokenizer))
    assert len(split) == 44  # 9 words of context fit, of which one is new
    assert task.score(certain(split, 64), split) == {"f1": 1.0, "exact_match": 1.0}


@pytest.mark.parametrize("column", ["id", "question", "context", "answers"])
def test_missing_columns(column: str, tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = {name: values for name, values in SHORT.items() if name != column}
    with pytest.raises(DataError, match=f"no column '{column}' of task 'squad'; there is "):
        build(tmp_path, write, SHORT, train=data).load(tokenizer)


def test_slow_tokenizers_are_refused(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ArchitectureError, match=r"task 'squad' needs the places of tokens .* a fast one"):
        build(tmp_path, write, SHORT).load(tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 64}, "task.stride = 64: windows of task.max_length = 64"),
        ({"metric": "exact"}, "did you mean 'exact_match'"),
        ({"metric": "NoAns_f1"}, "task 'squad' has no such metric"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(TaskConfig(**{"name": "squad", "max_length": 64, "stride": 8} | settings), DataConfig(), seed=0)


def test_answers_are_recovered_wherever_they_stand(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast
) -> None:
    """Every run of words of a context, seen through windows of many sizes."""
    words = "an old cat, 12 mats - and 3.5 dogs ran far away".split()
    context = " ".join(words)
    runs = [" ".join(words[i:j]) for i, j in itertools.combinations(range(len(words) + 1), 2) if j - i <= 4]
    data = columns(*(("who", context, answer(context, run)) for run in runs))
    # Every answer, of at most 21 pieces, is whole in some window: they share more.
    for max_length, stride in ((64, 24), (40, 26), (37, 30)):
        task = build(tmp_path, write, data, max_length=max_length, stride=stride)
        split = validation(task.load(speller))
        given = task.answers(certain(split, max_length), split)
        assert list(given.values()) == runs
