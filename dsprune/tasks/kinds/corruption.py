"""Span corruption: an encoder-decoder writes what is missing from running text.

As for T5 (Raffel et al. 2020, arXiv 1910.10683, sections 3.1.4 and 3.3): spans of a window of packed documents are
dropped. The input holds one sentinel,
`<extra_id_0>`, `<extra_id_1>` and so on, in the place of each span; the target is every span behind its sentinel, and
one sentinel more. Both end with the end-of-sequence token.

A window has as many tokens as give an input of `task.max_length`. Which of them are dropped is a function of (seed,
epoch, place of the window) alone, so that neither a resumed run nor another number of ranks changes it. Evaluation
has the noise of epoch 0, always.

As in the authors' code, a window has `round(length * noise_density)` noise tokens in `round(noise tokens / mean_span)`
spans, every division into spans being as likely as any other, and begins with a token that stays. Their code leaves
out the last sentinel of the target, which the paper has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dsprune.config import DataConfig, TaskConfig
from dsprune.distill import VocabularyHead
from dsprune.errors import ArchitectureError
from dsprune.tasks.batching import Encoded, Tokeniser, Tokens
from dsprune.tasks.kinds.causal import WIKITEXT
from dsprune.tasks.kinds.text import (
    DecodedTask,
    check_documents,
    end_of_text,
    summed_surprisals,
    text_settings,
    text_stream,
)
from dsprune.tasks.losses import IGNORED
from dsprune.tasks.metrics.official import check_finite
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["CorruptedText", "Noise", "SpanCorruptionTask", "build_corruption"]

CORRUPTION_METRICS = ("perplexity", "loss")
SHORTEST = 2
"""Tokens of a window: one that stays and one that is dropped."""


@dataclass(frozen=True)
class Noise:
    """How much of a window is dropped, in how many spans.

    Attributes:
        density: share of the tokens.
        mean_span: tokens of a span, on average.
    """

    density: float
    mean_span: float

    def counts(self, length: int) -> tuple[int, int]:
        """Tokens that are dropped from a window, and spans that they form; there is at least one of both."""
        noise = min(max(round(length * self.density), 1), length - 1)
        spans = min(max(round(noise / self.mean_span), 1), noise, length - noise)
        return noise, spans

    def sizes(self, length: int) -> tuple[int, int]:
        """Tokens of the input and of the target that a window gives, their ends included."""
        noise, spans = self.counts(length)
        return length - noise + spans + 1, noise + spans + 2

    def window(self, max_length: int) -> int:
        """The longest window whose input has at most so many tokens."""
        length = SHORTEST
        while self.sizes(length + 1)[0] <= max_length:
            length += 1
        return length

    def mask(self, length: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """Which tokens of a window are dropped: [length] bool."""
        noise, spans = self.counts(length)
        dropped, kept = (_partition(total, spans, rng) for total in (noise, length - noise))
        runs = np.stack([kept, dropped], axis=1).reshape(-1)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """So many positive whole numbers of that sum, every such choice being as likely as any other."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def corrupt(
    window: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], sentinels: Sequence[int], end: int
) -> tuple[list[int], list[int]]:
    """Input and target of a window.

    Args:
        window: [length] token ids.
        mask: [length] which are dropped; the first is not.
        sentinels: in order, at least one more than there are spans.
        end: closes both.
    """
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    source: list[int] = []
    target: list[int] = []
    used = 0
    for token, dropped, first in zip(window.tolist(), mask.tolist(), begins.tolist(), strict=True):
        if first:
            source.append(sentinels[used])
            target.append(sentinels[used])
            used += 1
        (target if dropped else source).append(token)
    return [*source, end], [*target, sentinels[used], end]


class CorruptedText(Encoded):
    """Windows on a stream of documents, corrupted when they are asked for.

    Args:
        name: of the split.
        windows: as they are read.
        noise: what is dropped of them.
        sentinels: token ids, in order.
        end: end of a text.
        seed: of the noise.
    """

    def __init__(
        self,
        name: str,
        windows: Tokens,
        *,
        noise: Noise,
        sentinels: Sequence[int],
        end: int,
        seed: int,
    ) -> None:
        sizes = {length: noise.sizes(length) for length in set(windows.lengths.tolist())}
        inputs, targets = torch.tensor([sizes[length] for length in windows.lengths.tolist()]).unbind(1)
        super().__init__(name, windows, windows.input_ids, targets=targets)
        self.lengths = inputs
        self._windows, self._noise = windows, noise
        self._sentinels, self._end = tuple(sentinels), end
        self._seed, self._epoch = seed, 0

    def in_epoch(self, epoch: int) -> CorruptedText:
        view = copy.copy(self)
        view._epoch = epoch
        return view

    def pair(self, index: int) -> tuple[list[int], list[int]]:
        """Input and target of one window."""
        start, length = int(self._offsets[index]), int(self._windows.lengths[index])
        window = self._windows.input_ids[start : start + length].numpy()
        rng = np.random.default_rng((self._seed, self._epoch, index))
        return corrupt(window, self._noise.mask(length, rng), self._sentinels, self._end)

    def collate(self, indices: Sequence[int] | Tensor, pad_multiple: int = 1) -> dict[str, Tensor]:
        pairs = [self.pair(int(index)) for index in indices]
        sources, targets = ([torch.tensor(side) for side in sides] for sides in zip(*pairs, strict=True))
        width = -(-max(len(source) for source in sources) // pad_multiple) * pad_multiple
        lengths = torch.tensor([len(source) for source in sources])
        longest = max(len(target) for target in targets)
        return {
            "input_ids": _padded(sources, width, self._windows.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": _padded(targets, longest, IGNORED),
        }


def _padded(rows: Sequence[Tensor], width: int, padding: int) -> Tensor:
    full = torch.full((len(rows), width), padding, dtype=torch.int64)
    for row, values in zip(full, rows, strict=True):
        row[: len(values)] = values
    return full


@dataclass(frozen=True, kw_only=True)
class SpanCorruptionTask(DecodedTask):
    """The missing spans of running text.

    Attributes:
        column: of the texts, a document a row.
        noise: what is dropped of them.
        seed: of the noise.
    """

    column: str
    noise: Noise
    seed: int

    lower_is_better: ClassVar[bool] = True

    def predict(self, model: Any, head: VocabularyHead, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Summed surprisal of each window's target: [batch, 1]."""
        return summed_surprisals(model, head, self.arguments(model, inputs, labels), labels, chunk=self.chunk)

    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """Mean surprisal of a target token, sentinels included, and exp of it.

        Args:
            predictions: [windows, 1] summed surprisals.
            data: the split.

        Raises:
            NumericsError: surprisals that are not finite.
        """
        check_finite(predictions)
        loss = predictions.double().sum() / data.targets.sum()
        return dict(zip(CORRUPTION_METRICS, (loss.exp().item(), loss.item()), strict=True))

    def _check(self, splits: Splits) -> Splits:
        return check_documents(splits, self.column, self.name)

    def _encode(self, split: Split, tokeniser: Tokeniser) -> CorruptedText:
        length = self.noise.window(self.max_length)
        sentinels = self._sentinels(tokeniser, 1 + self.noise.counts(length)[1])
        stream, _ = text_stream(split, self.column, tokeniser)
        whole, rest = divmod(len(stream), length)
        if rest < SHORTEST:  # of a single token nothing could be dropped
            stream, rest = stream[: whole * length], 0
        windows = Tokens(stream, torch.tensor([length] * whole + [rest] * (rest > 0)), tokeniser.pad_token_id)
        end = end_of_text(tokeniser.tokenizer)
        return CorruptedText(split.name, windows, noise=self.noise, sentinels=sentinels, end=end, seed=self.seed)

    def _sentinels(self, tokeniser: Tokeniser, count: int) -> list[int]:
        """The first so many sentinels.

        Raises:
            ArchitectureError: the tokenizer has fewer.
        """
        known = tokeniser.tokenizer.get_vocab()
        names = [f"<extra_id_{i}>" for i in range(count)]
        there = next((i for i, name in enumerate(names) if name not in known), count)
        if there < count:
            raise ArchitectureError(
                f"task '{self.name}' drops up to {count - 1} spans of a window of {self.max_length} tokens and needs "
                f"{count} sentinels: the tokenizer of '{tokeniser.tokenizer.name_or_path}' has {there} of "
                f"<extra_id_0>, <extra_id_1>, ...; take that of a T5, or a shorter task.max_length"
            )
        ids = [known[name] for name in names]
        tokeniser.check_ids(torch.tensor(ids))
        return ids


def build_corruption(task: TaskConfig, data: DataConfig, seed: int) -> SpanCorruptionTask:
    """The task, its local files found but not yet read; by default on WikiText-2.

    Raises:
        ConfigError: a metric that the task has not, or contradictory data settings.
        DataError: `data.path` without the files of the task.
    """
    return SpanCorruptionTask(
        **text_settings(task, data, metrics=CORRUPTION_METRICS, columns=(task.text_column,), default=WIKITEXT),
        column=task.text_column,
        noise=Noise(task.noise_density, task.mean_span),
        seed=seed,
    )
