"""Tasks with a label for each word of a sentence: named entities in IOB2 tags.

The first piece of a word carries its label, the others none. Words beyond the longest sequence, and
those that the tokenizer drops, have no piece: in figures they count as predicted `O`, so that the
entities there are missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores
from seqeval.scheme import IOB2
from torch import Tensor

from dsprune.errors import DataError
from dsprune.tasks import losses
from dsprune.tasks.base import Head, LabelTask, Problem
from dsprune.tasks.batching import Encoded, Flat, Tokeniser, Tokens, flatten
from dsprune.tasks.metrics.official import check_finite
from dsprune.tasks.sources.columns import check_columns, refuse_first
from dsprune.tasks.sources.label_names import label_reader, labels_there, wanted_label
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["COLUMNS", "ENTITY_METRICS", "OUTSIDE", "TaggedWords", "TokenTask", "entity_scores", "first_pieces"]

OUTSIDE = "O"
"""Tag of a word that belongs to no entity."""
WORDS = "tokens"
"""Column of the words, as data sets name it."""
TAGS = "ner_tags"
"""Column of their tags."""
ENTITY_METRICS = ("f1", "precision", "recall", "strict_f1")
"""Official ones first; `strict_f1` is not official, see `entity_scores`."""

Integers = np.ndarray[Any, np.dtype[np.int64]]

COLUMNS = (WORDS, TAGS)
"""What CoNLL-2003 is read from."""


class TaggedWords(Encoded):
    """Sentences as token ids, and the tags of all their words.

    Attributes:
        tags: [words] label of every word of the split, one sentence after the other; int8, or int16 for many labels.
        num_words: [sentences] int64 words of each.
        labelled: [targets] int64 index into `tags` of each word that has a label, in the order of the tokens.
    """

    def __init__(
        self,
        name: str,
        tokens: Tokens,
        labels: Tensor,
        *,
        tags: Tensor,
        num_words: Tensor,
        labelled: Tensor,
        targets: Tensor,
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(name, tokens, labels, per_token=True, targets=targets, notes=notes)
        self.tags = tags
        self.num_words = num_words
        self.labelled = labelled

    def sentences(self, tags: Tensor, names: Sequence[str]) -> list[list[str]]:
        """Tags, [words], by name and sentence."""
        return [[names[tag] for tag in part.tolist()] for part in torch.split(tags, self.num_words.tolist())]


@dataclass(frozen=True, kw_only=True)
class TokenTask(LabelTask):
    """Tagging of words; `labels` are IOB2 tags, `O` among them.

    Attributes:
        columns: of the words and of their tags.
    """

    columns: tuple[str, str] = COLUMNS

    if_cut: ClassVar[str] = "no entity is found beyond"
    """What figures have to say where sentences are cut."""
    head: ClassVar[Head] = "ForTokenClassification"

    @property
    def problem(self) -> Problem:
        """A label for each word."""
        return "tokens"

    def loss(self, outputs: Tensor, labels: Tensor, *, count: Tensor) -> Tensor:
        """Cross entropy over the positions that have a label."""
        return losses.cross_entropy(outputs, labels) / count

    def logit_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, count: Tensor
    ) -> Tensor:
        """As of every task, over the positions that have a label."""
        where = labels != losses.IGNORED
        return losses.divergence(student[where], teacher[where], temperature=temperature) / count

    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """Precision, recall and F1 of whole entities, see `entity_scores`.

        Args:
            predictions: [sentences, width, labels] logits; anything past each sentence's length.
            data: the split.

        Raises:
            NumericsError: outputs that are not finite.
        """
        assert isinstance(data, TaggedWords)
        check_finite(predictions)
        real = torch.arange(predictions.shape[1]) < data.lengths[:, None]
        classes = predictions[real].argmax(-1)[data.labels != losses.IGNORED]
        tags = torch.full_like(data.tags, self.labels.index(OUTSIDE))
        tags[data.labelled] = classes.to(tags.dtype)
        return entity_scores(data.sentences(tags, self.labels), data.sentences(data.tags, self.labels))

    def _check(self, splits: Splits) -> Splits:
        checked = splits.map(self._check_split)
        seen = self._kinds(checked.train)
        train = checked.train.origin

        def compare(split: Split) -> Split:
            unseen = ", ".join(self.labels[tag] for tag in sorted(self._kinds(split) - seen))
            if not unseen:
                return split
            if checked.train.whole:
                raise DataError(f"{split.origin}: tags {unseen} do not occur in the training examples ({train})")
            return replace(split, notes=(*split.notes, f"{split.name}: tags {unseen} are not in the training examples"))

        return checked.map(compare)

    def _check_split(self, split: Split) -> Split:
        """The split with the ids of all tags, once they are known to be good."""
        words, tags = self.columns
        check_columns(split, self.columns, self.name)
        refuse_first(split, words, (not _are_words(row) for row in split.columns[words]), "expected a list of words")
        refuse_first(split, words, (not row for row in split.columns[words]), "expected at least one word")
        found = self._read_tags(split)
        for row, (sentence, labels) in enumerate(zip(split.columns[words], found, strict=True)):
            if len(sentence) != len(labels):
                raise DataError(f"{split.origin}: row {row} (from 0) has {len(sentence)} words and {len(labels)} tags")
        self._check_iob2(split, found)
        return replace(split, columns={words: split.columns[words], tags: found})

    def _read_tags(self, split: Split) -> list[list[int]]:
        """Ids of the tags of each sentence."""
        column = self.columns[1]
        rows, read = split.columns[column], label_reader(self.labels)
        found = [[read(tag) for tag in row] if isinstance(row, list) else None for row in rows]
        wrong = [row is None or None in row for row in found]
        there = labels_there(tag for row in rows if isinstance(row, list) for tag in row) if any(wrong) else ""
        refuse_first(split, column, wrong, f"for each word {wanted_label(self.labels)}", hint=there)
        return [[tag for tag in row if tag is not None] for row in found if row is not None]

    def _kinds(self, split: Split) -> set[int]:
        return {tag for sentence in split.columns[self.columns[1]] for tag in sentence}

    def _check_iob2(self, split: Split, tags: Sequence[Sequence[int]]) -> None:
        """Refuse entities that do not begin with a B tag, as in IOB1."""
        broken = [
            (row, position)
            for row, sentence in enumerate(tags)
            for position, (before, tag) in enumerate(zip([None, *sentence], sentence, strict=False))
            if not self._may_follow(before, tag)
        ]
        if broken:
            row, position = broken[0]
            raise DataError(
                f"{split.origin}: {len(broken)} tags are not IOB2: the first, {self.labels[tags[row][position]]} "
                f"of word {position} in row {row} (both from 0), continues no entity of its kind"
            )

    def _may_follow(self, before: int | None, tag: int) -> bool:
        place, _, kind = self.labels[tag].partition("-")
        return place != "I" or (before is not None and self.labels[before] in (f"B-{kind}", f"I-{kind}"))

    def _encode(self, split: Split, tokeniser: Tokeniser) -> TaggedWords:
        tokeniser.need_offsets(self.name)
        sentences, tags = (split.columns[column] for column in self.columns)
        small = torch.int8 if len(self.labels) <= torch.iinfo(torch.int8).max else torch.int16
        num_words = torch.tensor([len(words) for words in sentences])
        words_before = (num_words.cumsum(0) - num_words).tolist()

        def chunk(rows: slice) -> Flat:
            # Joined by spaces, words get the same pieces as in running text from every fast tokenizer;
            # byte-level ones would take words given one by one for a single long one.
            encoding = tokeniser.tokenizer(
                [" ".join(words) for words in sentences[rows]],
                truncation=True,
                max_length=tokeniser.max_length,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            aligned = list(map(_align, encoding["offset_mapping"], sentences[rows], tags[rows]))
            return flatten(encoding) | {
                "labels": torch.cat([labels for labels, _ in aligned]).to(small),
                "labelled": torch.cat(
                    [words + before for (_, words), before in zip(aligned, words_before[rows], strict=True)]
                ),
                "targets": torch.tensor([len(words) for _, words in aligned]),
                "cut": torch.tensor([bool(part.overflowing) for part in encoding.encodings]),
            }

        tokens, flat = tokeniser.run(split.name, len(split), chunk)
        cut = f"{int(flat['cut'].sum())} of {len(split)} sentences are cut at {self.max_length} tokens"
        return TaggedWords(
            split.name,
            tokens,
            flat["labels"],
            tags=torch.tensor([tag for sentence in tags for tag in sentence], dtype=small),
            num_words=num_words,
            labelled=flat["labelled"],
            targets=flat["targets"],
            notes=(f"{split.name}: {cut}, and {self.if_cut}",) if flat["cut"].any() else (),
        )


def _align(offsets: list[tuple[int, int]], words: Sequence[str], tags: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Labels of a sentence's tokens, [tokens] int16, and the words that have one, [words found]."""
    positions, found = first_pieces(np.array(offsets), words)
    labels = np.full(len(offsets), losses.IGNORED, dtype=np.int16)
    labels[positions] = np.array(tags)[found]
    return torch.from_numpy(labels), torch.from_numpy(found)


def first_pieces(offsets: Integers, words: Sequence[str]) -> tuple[Integers, Integers]:
    """Where each word of a sentence begins among its tokens.

    Args:
        offsets: [tokens, 2] first and past-the-last character of each token in the words joined by spaces.
        words: of the sentence.

    Returns:
        tokens that are the first piece of a word, and the words that they begin: [words found] each.
    """
    sizes = np.array([len(word) for word in words])
    starts = np.cumsum(sizes + 1) - sizes - 1
    # The last character decides: some tokenizers count the space before a word to its first piece.
    last = offsets[:, 1] - 1
    word = np.searchsorted(starts, last, side="right") - 1
    inside = np.flatnonzero((offsets[:, 1] > offsets[:, 0]) & (last < (starts + sizes)[word]))
    found, first = np.unique(word[inside], return_index=True)
    return inside[first], found


def entity_scores(predicted: list[list[str]], true: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities over all kinds, as fractions of 1; 0 where nothing is to be counted.

    `f1`, `precision` and `recall` count as the official script of CoNLL-2003 does, conlleval (Tjong Kim Sang and
    Buchholz 2000), by seqeval in its default mode: an I tag begins an entity too, where it stands first or after O
    or another kind. `strict_f1` is that of IOB2 read strictly, where such a tag is part of no entity. It is the
    higher of the two for a model that leaves many I tags alone, and compares with no published figure.

    Args:
        predicted: tags of each sentence.
        true: tags of each sentence.
    """
    precision, recall, f1, _ = precision_recall_fscore_support(true, predicted, average="micro", zero_division=0)
    strict = strict_scores(true, predicted, average="micro", scheme=IOB2, zero_division=0)
    found = (f1, precision, recall, strict[2])
    return {name: float(value) for name, value in zip(ENTITY_METRICS, found, strict=True)}


def _are_words(row: Any) -> bool:
    return isinstance(row, list) and all(isinstance(word, str) for word in row)
