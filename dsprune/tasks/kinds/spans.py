"""Tasks whose answer is a span of a text: the question stands first, the context second.

A context that is too long becomes several features: windows that overlap by `stride` tokens. A
feature that does not hold the whole answer points at its first token ([CLS]), which also stands for
no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dsprune.errors import DataError
from dsprune.tasks import losses
from dsprune.tasks.base import Head, LabelTask, Problem
from dsprune.tasks.batching import Encoded, Flat, Tokeniser, Tokens, flatten
from dsprune.tasks.metrics import answers
from dsprune.tasks.metrics.official import check_finite
from dsprune.tasks.sources.columns import check_columns, check_text, refuse_first
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["COLUMNS", "NO_SPAN", "TEXTS", "Questions", "SpanTask", "Windows", "locate"]

TEXTS = ("id", "question", "context")
"""Columns of texts, as data sets name them."""
COLUMNS = (*TEXTS, "answers")
NO_SPAN = (0, 0)
"""First and last token that a feature without the answer points at."""
TOLERATED = 0.01
"""Share of a split's examples whose answers may be out of place."""

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Questions:
    """The examples of a split, as scoring needs them.

    Attributes:
        ids: of the questions.
        contexts: [questions] texts; equal ones are one object.
        answers: [questions] all that count as right.
    """

    ids: tuple[str, ...]
    contexts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, split: Split) -> Questions:
        """Those of a checked split."""
        shared: dict[str, str] = {}
        return cls(
            tuple(split.columns["id"]),
            tuple(shared.setdefault(text, text) for text in split.columns["context"]),
            tuple(tuple(found["text"]) for found in split.columns["answers"]),
        )


class Windows(Encoded):
    """Features of questions, and what it takes to turn spans of tokens back into answers.

    Attributes:
        questions: examples that the features are windows on.
        question_of: [features] int64 index of each feature's question; features of one stand side by side.
        offsets: [tokens, 2] int16 or int32 first and past-the-last character in the context; both 0 outside of it.
    """

    def __init__(
        self, name: str, tokens: Tokens, labels: Tensor, *, questions: Questions, question_of: Tensor, offsets: Tensor
    ) -> None:
        super().__init__(name, tokens, labels, per_token=True)
        self.questions = questions
        self.question_of = question_of
        self.offsets = offsets
        self._first = (self.lengths.cumsum(0) - self.lengths).tolist()

    def in_context(self, width: int) -> Tensor:
        """Tokens that stand for characters of the context: [features, width] bool."""
        allowed = torch.zeros(len(self), width, dtype=torch.bool)
        allowed[torch.arange(width) < self.lengths[:, None]] = self.offsets[:, 1] > self.offsets[:, 0]
        return allowed

    def text(self, feature: int, start: int, end: int) -> str:
        """What stands in the context from one token of a feature to another."""
        first = self._first[feature]
        begin, finish = int(self.offsets[first + start, 0]), int(self.offsets[first + end, 1])
        return self.questions.contexts[int(self.question_of[feature])][begin:finish]


@dataclass(frozen=True, kw_only=True)
class SpanTask(LabelTask):
    """Extraction of answers.

    Attributes:
        stride: tokens that neighbouring windows share.
        max_answer_length: longest answer in tokens.
        n_best: how many starts, and how many ends, are combined.
        may_be_unanswerable: questions may have no answer.
        null_threshold: how much the score of no answer must exceed the best answer's to be given.
    """

    stride: int
    max_answer_length: int
    n_best: int
    may_be_unanswerable: bool
    null_threshold: float

    head: ClassVar[Head] = "ForQuestionAnswering"

    @property
    def problem(self) -> Problem:
        """A span of the text."""
        return "spans"

    @property
    def num_labels(self) -> int:
        """Start and end."""
        return 2

    def outputs(self, model_output: Any) -> Tensor:
        """Start and end logits: [batch, length, 2]."""
        return torch.stack([model_output.start_logits, model_output.end_logits], dim=-1)

    def loss(self, outputs: Tensor, labels: Tensor, *, count: Tensor) -> Tensor:
        """Mean of the cross entropies of start and end, over the real tokens."""
        return losses.span_cross_entropy(outputs, labels) / count

    def logit_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, count: Tensor
    ) -> Tensor:
        """As of every task, over the real tokens; start and end are added."""
        return losses.span_divergence(student, teacher, labels, temperature=temperature) / count

    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """The figures of the official scripts, see `answers`.

        Args:
            predictions: [features, width, 2] start and end logits; anything past each feature's length.
            data: the split.

        Raises:
            NumericsError: outputs that are not finite.
        """
        assert isinstance(data, Windows)
        given, margins = self._best_answers(predictions, data)
        if self.may_be_unanswerable:
            return answers.score_or_none(given, data.questions.answers, margins, self.null_threshold)
        return answers.score_answers(given, data.questions.answers)

    def answers(self, predictions: Tensor, data: Windows) -> dict[str, str]:
        """The answer to each question by its id, as the official scripts read them; "" for none.

        The best span over all features of a question. Where there may be no answer, it is given if its
        score (both logits of the first token, the least over the features) exceeds that of the best
        span by more than the threshold.

        Raises:
            NumericsError: outputs that are not finite.
        """
        given, margins = self._best_answers(predictions, data)
        none = [self.may_be_unanswerable and margin > self.null_threshold for margin in margins]
        return {
            question: "" if skip else text for question, text, skip in zip(data.questions.ids, given, none, strict=True)
        }

    def _best_answers(self, predictions: Tensor, data: Windows) -> tuple[list[str], list[float]]:
        """The best span of each question ("" where there is none), and by how much no answer exceeds it."""
        check_finite(predictions)
        allowed = data.in_context(predictions.shape[1])
        spans = answers.best_spans(predictions, allowed, n_best=self.n_best, max_length=self.max_answer_length)
        no_answer = torch.full((len(data.questions.ids),), torch.inf)
        no_answer.scatter_reduce_(0, data.question_of, predictions[:, 0].float().sum(-1), "amin")
        best: dict[int, int] = {}
        scores, question_of = spans.scores.tolist(), data.question_of.tolist()
        for feature, question in enumerate(question_of):
            if question not in best or scores[feature] > scores[best[question]]:
                best[question] = feature
        chosen = [best[question] for question in range(len(data.questions.ids))]
        texts = [
            "" if scores[row] == -torch.inf else data.text(row, int(spans.starts[row]), int(spans.ends[row]))
            for row in chosen
        ]
        return texts, [none - scores[row] for none, row in zip(no_answer.tolist(), chosen, strict=True)]

    # --- examples -------------------------------------------------------------------------

    def _check(self, splits: Splits) -> Splits:
        checked = splits.map(self._check_split)
        for split in checked.evals.values():
            kinds = {bool(found["text"]) for found in split.columns["answers"]}
            needed = {"HasAns": True, "NoAns": False}.get(self.primary.partition("_")[0])
            if needed is not None and needed not in kinds:
                raise DataError(f"{split.origin}: has no questions that task.metric = '{self.primary}' is measured on")
        return checked

    def _check_split(self, split: Split) -> Split:
        """The split without the examples whose answers are out of place."""
        check_columns(split, COLUMNS, self.name)
        check_text(split, TEXTS)
        least = 0 if self.may_be_unanswerable else 1
        wanted = (
            f"expected {{text: [...], answer_start: [...]}} of equal length{', at least one of each' if least else ''}"
        )
        refuse_first(split, "answers", (not _are_answers(v, least) for v in split.columns["answers"]), wanted)
        ids = split.columns["id"]
        first_of = {question: row for row, question in reversed(list(enumerate(ids)))}
        refuse_first(split, "id", (first_of[v] != row for row, v in enumerate(ids)), "expected an id of its own")
        return _drop_misplaced(split)

    def _encode(self, split: Split, tokeniser: Tokeniser) -> Windows:
        tokeniser.need_offsets(self.name)
        # Some questions begin with many spaces, which some tokenizers turn into as many tokens.
        asked = [question.lstrip() for question in split.columns["question"]]
        contexts, found = split.columns["context"], split.columns["answers"]
        # One number for each side of each token is what takes most memory.
        place = torch.int16 if max(map(len, contexts)) <= torch.iinfo(torch.int16).max else torch.int32

        def chunk(rows: slice) -> Flat:
            self._check_questions(split, asked[rows], rows.start, tokeniser)
            encoding = tokeniser.tokenizer(
                asked[rows],
                list(contexts[rows]),
                truncation="only_second",
                max_length=tokeniser.max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            question_of = [rows.start + index for index in encoding["overflow_to_sample_mapping"]]
            offsets = [
                np.array(places) * (np.array(part.sequence_ids) == 1)[:, None]
                for places, part in zip(encoding["offset_mapping"], encoding.encodings, strict=True)
            ]
            spans = [
                _span(places, contexts[question], found[question])
                for places, question in zip(offsets, question_of, strict=True)
            ]
            labels = [_labels(len(places), *span) for places, span in zip(offsets, spans, strict=True)]
            return flatten(encoding) | {
                "labels": torch.cat(labels),
                "offsets": torch.from_numpy(np.concatenate(offsets)).to(place),
                "question_of": torch.tensor(question_of),
            }

        tokens, flat = tokeniser.run(split.name, len(split), chunk)
        return Windows(
            split.name,
            tokens,
            flat["labels"],
            questions=Questions.of(split),
            question_of=flat["question_of"],
            offsets=flat["offsets"],
        )

    def _check_questions(self, split: Split, asked: Sequence[str], start: int, tokeniser: Tokeniser) -> None:
        """Refuse a question beside which windows on the context could not move on."""
        tokenizer = tokeniser.tokenizer
        sizes = [len(row) for row in tokenizer(asked, add_special_tokens=False)["input_ids"]]
        room = self.max_length - tokenizer.num_special_tokens_to_add(pair=True)
        row = next((row for row, size in enumerate(sizes) if room - size <= self.stride), None)
        if row is not None:
            question = split.columns["id"][start + row]
            raise DataError(
                f"{split.origin}: the question of '{question}' has {sizes[row]} tokens, beside which "
                f"task.max_length = {self.max_length} leaves {max(room - sizes[row], 0)} for the context: "
                f"windows need more than task.stride = {self.stride}"
            )


def locate(offsets: Integers, start: int, end: int) -> tuple[int, int]:
    """First and last token of some characters of the context, or `NO_SPAN` where not all are in the window.

    Args:
        offsets: [tokens, 2] as in `Windows`, of one feature.
        start: first character.
        end: past the last character.
    """
    first, last = offsets[:, 0], offsets[:, 1]
    context = np.flatnonzero(last > first)
    if not len(context) or first[context[0]] > start or last[context[-1]] < end:
        return NO_SPAN
    inside = context[(last[context] > start) & (first[context] < end)]
    return (int(inside[0]), int(inside[-1])) if len(inside) else NO_SPAN


def _span(offsets: Integers, context: str, found: dict[str, list[Any]]) -> tuple[int, int]:
    """Tokens of the first of a question's answers, without space around it, which has no tokens."""
    if not found["text"]:
        return NO_SPAN
    text, start = found["text"][0], found["answer_start"][0]
    start += len(text) - len(text.lstrip())
    return locate(offsets, start, start + len(text.strip()))


def _labels(length: int, start: int, end: int) -> Tensor:
    labels = torch.zeros(length, dtype=torch.int8)
    labels[start] |= losses.STARTS
    labels[end] |= losses.ENDS
    return labels


def _are_answers(value: Any, least: int) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("text"), list):
        return False
    texts, starts = value["text"], value.get("answer_start")
    return (
        isinstance(starts, list)
        and len(texts) == len(starts) >= least
        and all(isinstance(text, str) for text in texts)
        and all(type(start) is int for start in starts)
    )


def _drop_misplaced(split: Split) -> Split:
    """The split without answers that do not stand where they should; too many of these are refused."""
    misplaced = [
        row
        for row, (context, found) in enumerate(zip(split.columns["context"], split.columns["answers"], strict=True))
        if not all(map(_stands_at, [context] * len(found["text"]), found["text"], found["answer_start"]))
    ]
    if not misplaced:
        return split
    first = split.columns["id"][misplaced[0]]
    fact = (
        f"{len(misplaced)} of {len(split)} examples have an answer that is not at its answer_start (first: '{first}')"
    )
    if len(misplaced) > TOLERATED * len(split):
        raise DataError(f"{split.origin}: {fact}")
    dropped = set(misplaced)
    columns = {
        name: [value for row, value in enumerate(values) if row not in dropped]
        for name, values in split.columns.items()
    }
    return replace(split, columns=columns, notes=(*split.notes, f"{split.name}: {fact}; they are left out"))


def _stands_at(context: str, text: str, start: int) -> bool:
    return bool(text.strip()) and start >= 0 and context.startswith(text, start)
