"""What a task is: examples, labels, losses and metrics. The kinds of tasks are its subclasses."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsprune.errors import ArchitectureError, ConfigError
from dsprune.files import did_you_mean
from dsprune.tasks.batching import Encoded, Tokeniser
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["Head", "LabelTask", "Problem", "Task", "TaskData", "choose_metric"]

logger = logging.getLogger(__name__)

Problem = Literal["classification", "regression", "multi_label", "spans", "tokens", "text"]
Head = Literal[
    "ForSequenceClassification",
    "ForQuestionAnswering",
    "ForTokenClassification",
    "ForCausalLM",
    "ForConditionalGeneration",
]


@dataclass
class TaskData:
    """Training and evaluation examples as token ids.

    Attributes:
        train: training examples.
        evals: evaluation examples by name; for MNLI `matched` and `mismatched`. A file that is not an
            official split goes by its own name.
        notes: sentences that have to stand beside every figure: partial files, first so many examples.
        origins: file or hub address of each split, with the commit where the hub tells it.
    """

    train: Encoded
    evals: dict[str, Encoded]
    notes: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One task, ready to read its data.

    Losses are sums over targets, divided by the targets of a mean micro-batch of the step, over all ranks
    and accumulation steps. So unequal micro-batches average over the whole batch. A target is an example,
    a feature of a span task, a labelled token, or a token of text.

    Attributes:
        name: as in `task.name`.
        labels: class names in the order of the label ids; empty for a regression and for spans.
        metrics: official metrics.
        primary: the metric that picks the best model.
        max_length: tokens at which features are cut.
        read: gets the examples; its argument says whether progress may be shown.
        head: suffix of the transformers class whose outputs the task reads.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    max_length: int
    read: Callable[[bool], Splits] = field(repr=False)

    head: ClassVar[Head]
    lower_is_better: ClassVar[bool] = False
    """Whether a small value of the primary metric is a good one."""

    @property
    @abstractmethod
    def problem(self) -> Problem:
        """What kind of task it is."""

    @property
    def num_labels(self) -> int:
        """Outputs of the head: classes, or 1 for a regression."""
        return len(self.labels) or 1

    def load(
        self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None, progress: bool = False
    ) -> TaskData:
        """Read, check and tokenise all splits, in memory.

        Args:
            tokenizer: of the model.
            vocab_size: embeddings that the model has, to check token ids against.
            progress: show progress bars where it takes long; say so on one rank only.

        Raises:
            DataError: missing files or columns, empty splits, labels or texts that cannot be.
            ArchitectureError: a tokenizer that does not fit.
        """
        tokeniser = Tokeniser(tokenizer, self.max_length, self._padding(tokenizer), vocab_size, progress)
        splits = self._check(self.read(progress))
        evals = {name: self._encode(split, tokeniser) for name, split in splits.evals.items()}
        train = self._encode(splits.train, tokeniser)
        notes = (
            *splits.train.notes,
            *train.notes,
            *(note for name, split in splits.evals.items() for note in (*split.notes, *evals[name].notes)),
        )
        for note in notes:
            logger.warning("task %s: %s", self.name, note)
        return TaskData(train, evals, notes, tuple(split.origin for split in splits))

    def load_evals(
        self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None, progress: bool = False
    ) -> tuple[dict[str, Encoded], tuple[str, ...]]:
        """Read, check and tokenise the evaluation splits alone, and what is to be said beside their figures.

        Arguments and errors are those of `load`.
        """
        tokeniser = Tokeniser(tokenizer, self.max_length, self._padding(tokenizer), vocab_size, progress)
        splits = self._check(self.read(progress)).evals
        evals = {name: self._encode(split, tokeniser) for name, split in splits.items()}
        return evals, tuple(note for name, split in splits.items() for note in (*split.notes, *evals[name].notes))

    @abstractmethod
    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """The official metrics by name, of all predictions of a split; shares are fractions of 1.

        Args:
            predictions: [features, ...] in the order of the split: outputs of the model ([features, classes],
                or [features, width, classes] with anything past each feature's length), or what a text task
                makes of them.
            data: the split.

        Raises:
            NumericsError: outputs that are not finite.
        """

    def merit(self, scores: Mapping[str, float]) -> float:
        """How good metrics are, more being better: the primary one, its mean where there are several splits.

        A test split is reported, never picked by.
        """
        values = [
            value
            for name, value in scores.items()
            if name.split("/")[-1] == self.primary and not name.startswith("test/")
        ]
        mean = sum(values) / len(values)
        return -mean if self.lower_is_better else mean

    def _padding(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """What batches are padded with.

        Raises:
            ArchitectureError: a tokenizer without a padding token.
        """
        if tokenizer.pad_token_id is None:
            raise ArchitectureError(f"the tokenizer of '{tokenizer.name_or_path}' has no padding token")
        return int(tokenizer.pad_token_id)

    @abstractmethod
    def _check(self, splits: Splits) -> Splits:
        """Splits that are known to be good; what had to be left out is in their notes."""

    @abstractmethod
    def _encode(self, split: Split, tokeniser: Tokeniser) -> Encoded:
        """A checked split as token ids."""


class LabelTask(Task):
    """A task whose outputs are few, so that its losses and metrics are made from all of them."""

    def outputs(self, model_output: Any) -> Tensor:
        """The one tensor of predictions in what the model returns.

        Returns:
            [batch, classes], or [batch, 1] for a regression; [batch, length, 2] start and end logits for
            spans; [batch, length, classes] for tokens.
        """
        logits: Tensor = model_output.logits
        return logits

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor, *, count: Tensor) -> Tensor:
        """The task's own loss, summed over targets and divided by `count`: [].

        Args:
            outputs: as `outputs` gives them.
            labels: of the same batch, as `Encoded.collate` gives them.
            count: [] targets of a mean micro-batch of the step.
        """

    @abstractmethod
    def logit_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, count: Tensor
    ) -> Tensor:
        """T^2 * KL(teacher || student), summed over targets and divided by `count`: [].

        Args:
            student: outputs, as `outputs` gives them.
            teacher: outputs for the same batch.
            labels: of the same batch; only where they are -100 matters.
            temperature: T.
            count: [] targets of a mean micro-batch of the step.
        """


def choose_metric(task: str, official: tuple[str, ...], asked: str | None) -> str:
    """The metric that picks the best model: the one asked for, or the first of the official ones.

    Raises:
        ConfigError: a metric that the task has not.
    """
    if asked is None:
        return official[0]
    if asked not in official:
        hint = did_you_mean(asked, official, otherwise=f"it has {', '.join(official)}", cutoff=0.4)
        raise ConfigError(f"task.metric = '{asked}': task '{task}' has no such metric; {hint}")
    return asked
