"""Tasks whose answers are tokens of text: their outputs are too many to keep, so losses come from the model's head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsprune.config import DataConfig, TaskConfig
from dsprune.distill import VocabularyHead, surprisals
from dsprune.errors import ArchitectureError, DataError
from dsprune.tasks.base import Head, Problem, Task, choose_metric
from dsprune.tasks.batching import Flat, Tokeniser, flatten
from dsprune.tasks.losses import IGNORED
from dsprune.tasks.sources.columns import check_columns, check_text
from dsprune.tasks.sources.readers import HubData, SplitReader, eval_splits, named_data
from dsprune.tasks.sources.splits import Split, Splits

__all__ = [
    "DecodedTask",
    "TextTask",
    "check_documents",
    "end_of_text",
    "summed_surprisals",
    "text_settings",
    "text_stream",
]


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A task over the vocabulary; a label is the token that the model is to give at a position.

    Attributes:
        chunk: tokens whose logits exist at a time.
    """

    chunk: int

    @property
    def problem(self) -> Problem:
        """Tokens of text."""
        return "text"

    def arguments(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The model's arguments, those that come from the labels included; by default there are none.

        Args:
            model: whose arguments are wanted.
            inputs: of a batch, as `Encoded.collate` gives them.
            labels: of the batch.
        """
        return dict(inputs)

    @abstractmethod
    def predict(self, model: Any, head: VocabularyHead, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """What metrics are made of: [batch, n], as wide for every batch. Collective under ZeRO-3.

        Args:
            model: or what runs it.
            head: of the model.
            inputs: of a batch, as `Encoded.collate` gives them.
            labels: of the batch.
        """


@dataclass(frozen=True, kw_only=True)
class DecodedTask(TextTask):
    """A task whose answers a decoder writes, beside an encoder that reads the inputs."""

    head: ClassVar[Head] = "ForConditionalGeneration"

    def arguments(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The decoder is given the targets, shifted to the right."""
        return {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}


def summed_surprisals(
    model: Any, head: VocabularyHead, arguments: Mapping[str, Tensor], labels: Tensor, *, chunk: int
) -> Tensor:
    """-log p of each row's labels, added: [batch, 1]. Collective under ZeRO-3.

    Args:
        model: or what runs it.
        head: of the model.
        arguments: of the model.
        labels: [batch, length], `IGNORED` where there is no target.
        chunk: tokens whose logits exist at a time.
    """

    def question(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        where = labels != IGNORED
        found = hidden.new_zeros(labels.shape, dtype=torch.float32)
        found[where] = surprisals(hidden[where], weight, bias, labels[where], chunk=chunk)
        return found.sum(1, keepdim=True)

    answer: Tensor = head.ask(question, model, **arguments)
    return answer


def check_documents(splits: Splits, column: str, task: str) -> Splits:
    """See that a column holds text in every split.

    Raises:
        DataError: no such column, something else than text, or blank rows alone.
    """
    for split in splits:
        check_columns(split, (column,), task)
        check_text(split, (column,))
        if not any(text.strip() for text in split.columns[column]):
            raise DataError(f"{split.origin}: column '{column}' holds no text, only blank rows")
    return splits


def text_stream(split: Split, column: str, tokeniser: Tokeniser) -> tuple[Tensor, int]:
    """All documents of a split as one stream, each closed by the end-of-sequence token.

    Returns:
        token ids [tokens] int32; and the words of the raw text, as whitespace separates them.
    """
    tokenizer, end = tokeniser.tokenizer, end_of_text(tokeniser.tokenizer)
    texts = [text for text in split.columns[column] if text.strip()]

    def chunk(rows: slice) -> Flat:
        # Documents are longer than the model's positions before they are cut: no cause for a warning.
        ids = tokenizer(texts[rows], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return flatten({"input_ids": [[*document, end] for document in ids["input_ids"]]})

    documents, _ = tokeniser.run(split.name, len(texts), chunk)
    return documents.input_ids, sum(len(text.split()) for text in texts)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text.

    Raises:
        ArchitectureError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ArchitectureError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no end-of-sequence token: name one (eos_token) in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def text_settings(
    task: TaskConfig, data: DataConfig, *, metrics: tuple[str, ...], columns: tuple[str, ...], default: HubData | None
) -> dict[str, Any]:
    """What every text task is made with; its local files are found but not yet read.

    Args:
        task: settings of the task.
        data: settings of its data.
        metrics: that it has, the first picks the best model unless another is asked for.
        columns: that are read.
        default: data set of the hub that is used unless another is named.

    Raises:
        ConfigError: a metric that the task has not, no data set, or contradictory data settings.
        DataError: `data.path` without the files of the task.
    """
    return {
        "name": task.name,
        "labels": (),
        "metrics": metrics,
        "primary": choose_metric(task.name, metrics, task.metric),
        "max_length": task.max_length,
        "read": SplitReader(task.name, data, named_data(task.name, data, default), eval_splits(data), columns, columns),
        "chunk": task.logits_chunk,
    }
