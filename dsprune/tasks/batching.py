"""Tokenised examples in memory, and batches of them padded to their longest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dsprune.errors import ArchitectureError
from dsprune.tasks.losses import IGNORED

__all__ = ["Encoded", "Tokeniser", "Tokens", "encode", "flatten"]

CHUNK = 1000
"""Examples tokenised at a time: the tokenizer's own records are far larger than the ids that are kept."""
LONG = 20_000
"""Examples above which tokenising takes long enough to show a progress bar."""

Flat = dict[str, Tensor]
"""Flat tensors, without padding, by name."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of a split.

    Attributes:
        input_ids: [tokens] int32, one feature after the other.
        lengths: [features] int64 tokens of each.
        pad_token_id: what batches are padded with.
        token_type_ids: [tokens] int8, where the model reads them.
        pad_token_type_id: what these are padded with.
    """

    input_ids: Tensor
    lengths: Tensor
    pad_token_id: int
    token_type_ids: Tensor | None = None
    pad_token_type_id: int = 0


class Encoded:
    """One split as token ids: one flat tensor, without padding.

    A feature is what the model sees at once: an example, or one of several windows on it.

    Attributes:
        name: of the split; one that is not the official split says so (`train_partial`).
        labels: [features] int64 class indices or float32 target values, or [tokens] of any integer type.
        lengths: [features] int64 tokens of each feature.
        targets: [features] int64 terms that each adds to the task's loss.
        notes: what figures measured on it have to say since it was tokenised.
    """

    def __init__(
        self,
        name: str,
        tokens: Tokens,
        labels: Tensor,
        *,
        per_token: bool = False,
        targets: Tensor | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.lengths = tokens.lengths
        self.labels = labels
        self.targets = torch.ones_like(self.lengths) if targets is None else targets
        self.notes = notes
        self._per_token = per_token
        self._offsets = self.lengths.cumsum(0) - self.lengths
        self._streams = {"input_ids": (tokens.input_ids, tokens.pad_token_id)}
        if tokens.token_type_ids is not None:
            self._streams["token_type_ids"] = (tokens.token_type_ids, tokens.pad_token_type_id)
        if per_token:
            self._streams["labels"] = (labels, IGNORED)

    def __len__(self) -> int:
        return len(self.lengths)

    def tensors(self) -> list[Tensor]:
        """All that a split holds, for a digest of it."""
        return [self.lengths, self.labels, self.targets, *(flat for flat, _ in self._streams.values())]

    def in_epoch(self, epoch: int) -> Encoded:
        """The split as an epoch of training has it: the same in each, but where noise is part of the task."""
        return self

    def collate(self, indices: Sequence[int] | Tensor, pad_multiple: int = 1) -> dict[str, Tensor]:
        """The model's arguments for some features, and their labels.

        Args:
            indices: [batch] features.
            pad_multiple: the batch is padded on the right to its longest feature, rounded up to a
                multiple of this.

        Returns:
            `input_ids`, `attention_mask` and, where the model reads them, `token_type_ids`: [batch,
            length] int64; `labels`: [batch], or [batch, length] int64 with -100 on padding.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.lengths[chosen]
        width = -(-int(lengths.max()) // pad_multiple) * pad_multiple
        column = torch.arange(width)
        real = column < lengths[:, None]
        source = torch.where(real, self._offsets[chosen, None] + column, 0)
        batch = {name: torch.where(real, flat[source].long(), pad) for name, (flat, pad) in self._streams.items()}
        if not self._per_token:
            batch["labels"] = self._labels_of(chosen)
        return batch | {"attention_mask": real.long()}

    def _labels_of(self, chosen: Tensor) -> Tensor:
        """Labels of some features, where they do not stand by the tokens."""
        return self.labels[chosen]


@dataclass(frozen=True)
class Tokeniser:
    """The tokenizer of a model, for whole splits.

    Attributes:
        tokenizer: of the model.
        max_length: tokens at which features are cut.
        pad_token_id: what batches are padded with.
        vocab_size: embeddings that the model has; by default what the tokenizer says.
        progress: show a bar where it takes long.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    pad_token_id: int
    vocab_size: int | None = None
    progress: bool = False

    def need_offsets(self, task: str) -> None:
        """Refuse a tokenizer that cannot say where in the text its tokens stand.

        Raises:
            ArchitectureError: a slow tokenizer.
        """
        if not self.tokenizer.is_fast:
            raise ArchitectureError(
                f"task '{task}' needs the places of tokens in the text, and the tokenizer of "
                f"'{self.tokenizer.name_or_path}' does not tell them: it needs a fast one (tokenizer.json)"
            )

    def run(self, name: str, num_examples: int, chunk: Callable[[slice], Flat]) -> tuple[Tokens, Flat]:
        """Tokenise a split chunk by chunk.

        Args:
            name: of the split.
            num_examples: of the split.
            chunk: gives what `flatten` does, and whatever else is to be kept, for some examples.

        Returns:
            the tokens, and the rest, each joined over all chunks.

        Raises:
            ArchitectureError: token ids that the model has not.
        """
        starts = range(0, num_examples, CHUNK)
        hidden = not self.progress or num_examples < LONG
        bar = tqdm(starts, desc=f"tokenising {name}", unit_scale=CHUNK, disable=hidden)
        parts = [chunk(slice(start, start + CHUNK)) for start in bar]
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        tokens = Tokens(
            joined.pop("input_ids"),
            joined.pop("lengths"),
            self.pad_token_id,
            joined.pop("token_type_ids", None),
            int(self.tokenizer.pad_token_type_id),
        )
        self.check_ids(tokens.input_ids)
        return tokens, joined

    def check_ids(self, input_ids: Tensor) -> None:
        """See that the model has embeddings for token ids.

        Raises:
            ArchitectureError: it has not.
        """
        known = len(self.tokenizer) if self.vocab_size is None else self.vocab_size
        largest = int(input_ids.max())
        if largest >= known:
            raise ArchitectureError(
                f"the tokenizer gives token id {largest} and the model has {known} embeddings: "
                "they do not belong together"
            )


def encode(name: str, texts: Sequence[Sequence[str]], labels: Tensor, tokeniser: Tokeniser) -> Encoded:
    """Tokenise a split of sentences or pairs, one feature an example.

    Args:
        name: of the split.
        texts: one or two columns of [examples] strings; two are encoded as pairs, cut at the longer one.
        labels: [examples].
        tokeniser: of the model.

    Raises:
        ArchitectureError: token ids that the model has not.
    """

    def chunk(rows: slice) -> Flat:
        return flatten(
            tokeniser.tokenizer(
                *(list(column[rows]) for column in texts),
                truncation="longest_first",
                max_length=tokeniser.max_length,
                return_attention_mask=False,
            )
        )

    tokens, _ = tokeniser.run(name, len(texts[0]), chunk)
    return Encoded(name, tokens, labels)


def flatten(encoding: Mapping[str, list[list[int]]]) -> Flat:
    """Ragged lists as flat tensors of the smallest fitting type, and their lengths."""
    rows = encoding["input_ids"]
    flat = {
        "lengths": torch.tensor([len(row) for row in rows]),
        "input_ids": torch.tensor([token for row in rows for token in row], dtype=torch.int32),
    }
    if "token_type_ids" in encoding:
        types = [kind for row in encoding["token_type_ids"] for kind in row]
        flat["token_type_ids"] = torch.tensor(types, dtype=torch.int8)
    return flat
