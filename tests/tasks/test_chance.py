"""Worse than chance: permuted and reversed answers are caught, poor and constant ones and small samples are not."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsprune.config import DataConfig, TaskConfig
from dsprune.tasks import build_task
from dsprune.tasks.batching import Encoded, Tokens
from dsprune.tasks.chance import below_chance, only_guesses

N = 400


def _task(name):
    return build_task(TaskConfig(name=name, stride=16), DataConfig(), seed=0)


def _split(labels, *, per_token=False, lengths=None):
    lengths = torch.ones(len(labels), dtype=torch.int64) if lengths is None else lengths
    tokens = Tokens(torch.zeros(int(lengths.sum()), dtype=torch.int32), lengths, 0)
    return Encoded("validation", tokens, labels, per_token=per_token)


def _answers(labels, classes, accuracy, order=None):
    """Outputs that are right in so many cases, under labels in another order."""
    generator = torch.Generator().manual_seed(1)
    wrong = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    given = torch.where(torch.rand(labels.shape, generator=generator) < accuracy, labels, wrong)
    return F.one_hot(given if order is None else torch.tensor(order)[given], classes).float()


def _doubt(name, outputs, data, scores=(), vocab_size=50):
    return below_chance(_task(name), outputs, data, dict(scores), vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("name", "classes", "order", "exchange"),
    [
        ("sst2", 2, [1, 0], "positive -> negative, negative -> positive"),
        ("mnli", 3, [0, 2, 1], "contradiction -> neutral, neutral -> contradiction"),
        ("mnli", 3, [1, 2, 0], "->"),
    ],
)
def test_labels_in_another_order_are_told(name, classes, order, exchange):
    labels = torch.arange(N) % classes
    data = _split(labels)
    assert _doubt(name, _answers(labels, classes, 0.85), data) is None
    reason = _doubt(name, _answers(labels, classes, 0.85, order), data)
    assert exchange in reason
    assert "with its labels exchanged" in reason


@pytest.mark.parametrize("accuracy", [0.0, 0.2, 0.35, 0.45, 0.5, 0.6, 1.0])
def test_two_labels_are_doubted_below_chance_and_not_at_it(accuracy):
    labels = torch.arange(N) % 2
    reason = _doubt("sst2", _answers(labels, 2, accuracy), _split(labels))
    assert (reason is not None) == (accuracy < 0.4)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("name", "classes"), [("sst2", 2), ("mnli", 3)])
@pytest.mark.parametrize("count", [10, 30, N])
def test_who_guesses_is_not_doubted(name, classes, count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels, given = torch.randint(classes, (2, count), generator=generator)
    assert _doubt(name, F.one_hot(given, classes).float(), _split(labels)) is None


def test_one_answer_for_everything():
    """The commoner label is a poor teacher, and said so; the rarer one is worse than chance."""
    labels = (torch.arange(N) % 10 >= 7).long()
    data = _split(labels)
    common, rare = (F.one_hot(torch.full((N,), label), 2).float() for label in (0, 1))
    assert _doubt("sst2", common, data) is None
    assert "70.0% if all were 'negative'" in only_guesses(_task("sst2"), common, data)
    assert "30.0% of its answers are right" in _doubt("sst2", rare, data)
    assert only_guesses(_task("sst2"), _answers(labels, 2, 0.9), data) is None


def test_tags_of_words_are_answers_too():
    lengths = torch.tensor([5, 3] * 60)
    labels = torch.arange(int(lengths.sum())) % 9
    labels[::4] = -100
    data = _split(labels.to(torch.int8), per_token=True, lengths=lengths)
    real = torch.arange(5) < lengths[:, None]
    for order, doubted in ((None, False), ([0, 3, 4, 1, 2, 5, 6, 7, 8], True)):
        outputs = torch.randn(len(lengths), 5, 9)
        outputs[real] = _answers(labels.clamp(min=0), 9, 0.9, order)
        assert (_doubt("conll2003", outputs, data) is not None) is doubted


@pytest.mark.parametrize(
    ("sign", "noise", "doubted"), [(1, 0.5, False), (-1, 0.5, True), (-1, 0.0, True), (0, 1.0, False), (1, 0.0, False)]
)
def test_numbers_that_run_the_other_way_are_told(sign, noise, doubted):
    labels = torch.rand(N, generator=torch.Generator().manual_seed(0)) * 5
    outputs = (sign * labels + noise * torch.randn(N, generator=torch.Generator().manual_seed(2)))[:, None]
    assert (_doubt("stsb", outputs, _split(labels)) is not None) is doubted
    assert _doubt("stsb", torch.zeros(N, 1), _split(labels)) is None


def test_text_is_doubted_beyond_what_all_tokens_alike_would_give():
    data = _split(torch.zeros(3))
    assert _doubt("lm", torch.zeros(3, 1), data, {"perplexity": 50.0 * 2}) is None
    assert "other tokens" in _doubt("lm", torch.zeros(3, 1), data, {"perplexity": 50.0 * math.e + 1})
    assert _doubt("squad", torch.zeros(3, 4, 2), data, {"f1": 0.0}) is None
