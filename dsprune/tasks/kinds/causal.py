"""Causal language modelling: the next token of running text, in packed sequences without padding.

The documents of a split become one stream, each closed by the end-of-sequence token. A sequence is a
window on the stream; its last label is the first token of the next window. So every token of the split,
the ends of documents included, is predicted exactly once, whatever the length of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsprune.config import DataConfig, TaskConfig
from dsprune.distill import VocabularyHead
from dsprune.tasks.base import Head
from dsprune.tasks.batching import Encoded, Tokeniser, Tokens
from dsprune.tasks.kinds.text import (
    TextTask,
    check_documents,
    end_of_text,
    summed_surprisals,
    text_settings,
    text_stream,
)
from dsprune.tasks.metrics.official import check_finite
from dsprune.tasks.sources.readers import HubData
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["PERPLEXITIES", "WIKITEXT", "CausalTask", "PackedText", "build_causal"]

WIKITEXT = HubData("Salesforce/wikitext", "wikitext-2-v1")
PERPLEXITIES = ("perplexity", "word_perplexity")


class PackedText(Encoded):
    """A stream of documents, cut into windows.

    Attributes:
        num_words: words of the raw text, as whitespace separates them.
    """

    def __init__(self, name: str, tokens: Tokens, labels: Tensor, *, num_words: int) -> None:
        super().__init__(name, tokens, labels, per_token=True, targets=tokens.lengths)
        self.num_words = num_words


@dataclass(frozen=True, kw_only=True)
class CausalTask(TextTask):
    """The next token of running text.

    Perplexity per token is exp of the mean surprisal of all tokens, per word exp of their sum divided by the
    words of the raw text: only the latter compares models of different tokenizers.

    Attributes:
        column: of the texts, a document a row.
    """

    column: str

    head: ClassVar[Head] = "ForCausalLM"
    lower_is_better: ClassVar[bool] = True

    def predict(self, model: Any, head: VocabularyHead, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Summed surprisal of each sequence's labels: [batch, 1]."""
        return summed_surprisals(model, head, inputs, labels, chunk=self.chunk)

    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """Perplexity per token and per word.

        Args:
            predictions: [sequences, 1] summed surprisals.
            data: the split.

        Raises:
            NumericsError: surprisals that are not finite.
        """
        assert isinstance(data, PackedText)
        check_finite(predictions)
        total = predictions.double().sum()
        per_token, per_word = total / data.targets.sum(), total / data.num_words
        return dict(zip(PERPLEXITIES, (per_token.exp().item(), per_word.exp().item()), strict=True))

    def _padding(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Only the last window is padded, where nothing is attended to or predicted: any token will do."""
        return end_of_text(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def _check(self, splits: Splits) -> Splits:
        return check_documents(splits, self.column, self.name)

    def _encode(self, split: Split, tokeniser: Tokeniser) -> PackedText:
        tokenizer, end = tokeniser.tokenizer, end_of_text(tokeniser.tokenizer)
        labels, num_words = text_stream(split, self.column, tokeniser)
        # What the first token follows is what any other document's first token follows.
        begin = end if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        inputs = torch.cat([labels.new_tensor([begin]), labels[:-1]])
        whole, rest = divmod(len(labels), self.max_length)
        lengths = torch.tensor([self.max_length] * whole + [rest] * (rest > 0))
        tokens = Tokens(inputs, lengths, tokeniser.pad_token_id)
        return PackedText(split.name, tokens, labels, num_words=num_words)


def build_causal(task: TaskConfig, data: DataConfig, seed: int) -> CausalTask:
    """The task, its local files found but not yet read; by default on WikiText-2.

    Raises:
        ConfigError: a metric that the task has not, or contradictory data settings.
        DataError: `data.path` without the files of the task.
    """
    return CausalTask(
        **text_settings(task, data, metrics=PERPLEXITIES, columns=(task.text_column,), default=WIKITEXT),
        column=task.text_column,
    )
