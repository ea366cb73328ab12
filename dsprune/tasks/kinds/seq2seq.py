"""Text to text with an encoder-decoder: translation, summaries, or any answer that is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsprune.config import DataConfig, TaskConfig
from dsprune.distill import VocabularyHead
from dsprune.tasks.batching import Encoded, Flat, Tokeniser, Tokens, flatten
from dsprune.tasks.kinds.text import DecodedTask, end_of_text, text_settings
from dsprune.tasks.losses import IGNORED
from dsprune.tasks.metrics.official import check_finite
from dsprune.tasks.metrics.rouge_l import reads_more, rouge_l
from dsprune.tasks.sources.columns import check_columns, check_text, refuse_first
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["TEXT_METRICS", "Seq2SeqTask", "TextPairs", "build_seq2seq", "text_scores"]

TEXT_METRICS = ("rougeL", "exact")


class TextPairs(Encoded):
    """Sources as token ids, and the targets that belong to them.

    Attributes:
        references: the targets as they were read.
        tokenizer: turns what the model writes into text.
    """

    def __init__(
        self,
        name: str,
        sources: Tokens,
        targets: Tokens,
        *,
        references: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(name, sources, targets.input_ids, targets=targets.lengths, notes=notes)
        self._answers = Encoded(name, targets, targets.lengths)
        self.references = references
        self.tokenizer = tokenizer

    def _labels_of(self, chosen: Tensor) -> Tensor:
        """Token ids of the targets, [batch, target length], with -100 on padding."""
        return self._answers.collate(chosen)["input_ids"]


@dataclass(frozen=True, kw_only=True)
class Seq2SeqTask(DecodedTask):
    """A target written for a source; evaluated on what the model writes by itself, greedily.

    Attributes:
        columns: of source and target.
        prefix: put before every source.
        max_target_length: tokens at which targets are cut, and writing stops.
    """

    columns: tuple[str, str]
    prefix: str
    max_target_length: int

    def predict(self, model: Any, head: VocabularyHead, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Token ids that the model writes: [batch, max_target_length], padded."""
        shared = dist.is_initialized() and dist.get_world_size() > 1
        written = model.generate(
            **inputs,
            max_new_tokens=self.max_target_length,
            do_sample=False,
            num_beams=1,
            # Under ZeRO-3 every rank takes part in every forward pass: none stops before the last has.
            synced_gpus=shared,
        )[:, 1:]
        # An engine's own `config` is DeepSpeed's. Where there is no padding, `generate` pads with the end of a text.
        known = model.generation_config
        padding = known.eos_token_id if known.pad_token_id is None else known.pad_token_id
        padding = padding[0] if isinstance(padding, list) else padding
        return F.pad(written, (0, self.max_target_length - written.shape[1]), value=padding)

    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """ROUGE-L and exact match of whole texts, fractions of 1.

        Args:
            predictions: [examples, max_target_length] token ids.
            data: the split.

        Raises:
            NumericsError: token ids that are not finite.
        """
        assert isinstance(data, TextPairs)
        check_finite(predictions)
        written = data.tokenizer.batch_decode(predictions.long(), skip_special_tokens=True)
        return text_scores(written, data.references)

    def _check(self, splits: Splits) -> Splits:
        for split in splits:
            check_columns(split, self.columns, self.name)
            check_text(split, self.columns)
            for column in self.columns:
                blank = (not text.strip() for text in split.columns[column])
                refuse_first(split, column, blank, "expected text that is not blank")
        return replace(splits, evals={name: _noted(split, self.columns[1]) for name, split in splits.evals.items()})

    def _encode(self, split: Split, tokeniser: Tokeniser) -> TextPairs:
        tokenizer, end = tokeniser.tokenizer, end_of_text(tokeniser.tokenizer)
        sources, references = (split.columns[column] for column in self.columns)

        def source_chunk(rows: slice) -> Flat:
            texts = [self.prefix + text for text in sources[rows]]
            return flatten(tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False))

        def target_chunk(rows: slice) -> Flat:
            ids = tokenizer(text_target=list(references[rows]), add_special_tokens=False, verbose=False)["input_ids"]
            cut = [target[: self.max_target_length - 1] for target in ids]
            longer = torch.tensor([len(target) >= self.max_target_length for target in ids])
            return flatten({"input_ids": [[*target, end] for target in cut]}) | {"cut": longer}

        tokens, _ = tokeniser.run(split.name, len(split), source_chunk)
        answers, flat = tokeniser.run(split.name, len(split), target_chunk)
        cut = f"{int(flat['cut'].sum())} of {len(split)} targets are cut at {self.max_target_length} tokens"
        return TextPairs(
            split.name,
            tokens,
            Tokens(answers.input_ids, answers.lengths, IGNORED),
            references=references,
            tokenizer=tokenizer,
            notes=(f"{split.name}: {cut}",) if flat["cut"].any() else (),
        )


def _noted(split: Split, column: str) -> Split:
    """The split, with a word on ROUGE-L where rouge_score's own tokenizer would have given another one."""
    targets = split.columns[column]
    count = sum(map(reads_more, targets))
    if not count:
        return split
    note = (
        f"{split.name}: rougeL is of Unicode words (of characters, in scripts without spaces); rouge_score's default "
        f"tokenizer, which reads a-z and 0-9 only, would read {count} of {len(targets)} targets otherwise"
    )
    return replace(split, notes=(*split.notes, note))


def text_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-L (see `dsprune.tasks.metrics.rouge_l` for its tokens), and exact match.

    Args:
        written: texts to score; spaces at the ends do not count.
        references: as many right ones.
    """
    exact = sum(text.strip() == right.strip() for text, right in zip(written, references, strict=True))
    return dict(zip(TEXT_METRICS, (rouge_l(written, references), exact / len(references)), strict=True))


def build_seq2seq(task: TaskConfig, data: DataConfig, seed: int) -> Seq2SeqTask:
    """The task, its local files found but not yet read.

    Raises:
        ConfigError: a metric that the task has not, no data set, or contradictory data settings.
        DataError: `data.path` without the files of the task.
    """
    columns = (task.source_column, task.target_column)
    return Seq2SeqTask(
        **text_settings(task, data, metrics=TEXT_METRICS, columns=columns, default=None),
        columns=columns,
        prefix=task.prefix,
        max_target_length=task.max_target_length,
    )
