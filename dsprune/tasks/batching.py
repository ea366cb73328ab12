"""Tokenised examples in memory, and batches of them padded to their longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dsprune.errors import ArchitectureError

__all__ = ["Encoded", "encode"]

CHUNK = 1000
"""Examples tokenised at a time: the tokenizer's own records are far larger than the ids that are kept."""
LONG = 20_000
"""Examples above which tokenising takes long enough to show a progress bar."""


class Encoded:
    """The examples of one split as token ids: one flat tensor, without padding.

    Attributes:
        name: of the split; one that is not the official split says so (`train_partial`).
        labels: [examples] int64 class indices, or float32 target values.
        lengths: [examples] int64 tokens of each example.
    """

    def __init__(
        self,
        name: str,
        input_ids: Tensor,
        lengths: Tensor,
        labels: Tensor,
        *,
        pad_token_id: int,
        token_type_ids: Tensor | None = None,
        pad_token_type_id: int = 0,
    ) -> None:
        self.name = name
        self.lengths = lengths
        self.labels = labels
        self._offsets = lengths.cumsum(0) - lengths
        self._streams = {"input_ids": (input_ids, pad_token_id)}
        if token_type_ids is not None:
            self._streams["token_type_ids"] = (token_type_ids, pad_token_type_id)

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, indices: Sequence[int] | Tensor, pad_multiple: int = 1) -> dict[str, Tensor]:
        """The model's arguments for some examples, and their labels.

        Args:
            indices: [batch] examples.
            pad_multiple: the batch is padded on the right to its longest example, rounded up to a
                multiple of this.

        Returns:
            `input_ids`, `attention_mask` and, where the model reads them, `token_type_ids`: [batch,
            length] int64; `labels`: [batch].
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.lengths[chosen]
        width = -(-int(lengths.max()) // pad_multiple) * pad_multiple
        column = torch.arange(width)
        real = column < lengths[:, None]
        source = torch.where(real, self._offsets[chosen, None] + column, 0)
        batch = {name: torch.where(real, ids[source].long(), pad) for name, (ids, pad) in self._streams.items()}
        return batch | {"attention_mask": real.long(), "labels": self.labels[chosen]}


def encode(
    name: str,
    texts: Sequence[Sequence[str]],
    labels: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    vocab_size: int | None = None,
    progress: bool = False,
) -> Encoded:
    """Tokenise a split.

    Args:
        name: of the split.
        texts: one or two columns of [examples] strings; two are encoded as pairs.
        labels: [examples].
        tokenizer: of the model.
        max_length: longer examples are cut, pairs at the longer sentence.
        vocab_size: embeddings that the model has; by default what the tokenizer says.
        progress: show a bar where it takes long.

    Raises:
        ArchitectureError: a tokenizer without a padding token, or with ids that the model has not.
    """
    if tokenizer.pad_token_id is None:
        raise ArchitectureError(f"the tokenizer of '{tokenizer.name_or_path}' has no padding token")
    num_examples = len(texts[0])
    chunks = range(0, num_examples, CHUNK)
    bar = tqdm(chunks, desc=f"tokenising {name}", unit_scale=CHUNK, disable=not progress or num_examples < LONG)
    parts = [
        _flatten(tokenizer(*(list(column[start : start + CHUNK]) for column in texts), **_options(max_length)))
        for start in bar
    ]
    streams = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    known = len(tokenizer) if vocab_size is None else vocab_size
    largest = int(streams["input_ids"].max())
    if largest >= known:
        raise ArchitectureError(
            f"the tokenizer gives token id {largest} and the model has {known} embeddings: they do not belong together"
        )
    return Encoded(
        name,
        streams["input_ids"],
        streams["lengths"],
        labels,
        pad_token_id=int(tokenizer.pad_token_id),
        token_type_ids=streams.get("token_type_ids"),
        pad_token_type_id=int(tokenizer.pad_token_type_id),
    )


def _options(max_length: int) -> dict[str, Any]:
    return {"truncation": "longest_first", "max_length": max_length, "return_attention_mask": False}


def _flatten(encoding: Mapping[str, list[list[int]]]) -> dict[str, Tensor]:
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
