from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ArchitectureError, ConfigError, DataError, NumericsError
from dsprune.tasks import TaskData, batching, build_task
from dsprune.tasks.benchmarks.conll import TAG_NAMES
from dsprune.tasks.kinds.tokens import ENTITY_METRICS, TaggedWords, TokenTask, entity_scores, first_pieces
from dsprune.tasks.losses import IGNORED
from tests.tasks.conftest import Write

O, B_PER, I_PER, B_ORG, I_ORG, B_LOC, I_LOC, B_MISC, I_MISC = range(9)  # noqa: E741  (the tag's own name)

Columns = dict[str, list[Any]]

DATA: Columns = {
    "id": ["0", "1", "2"],
    "tokens": [["anna", "lee", "met", "bob", "."], ["oslo"], ["the", "un", "of", "new", "york"]],
    "ner_tags": [[B_PER, I_PER, O, B_PER, O], [B_LOC], [O, B_ORG, O, B_LOC, I_LOC]],
}


def build(folder: Path, write: Write, *, max_length: int = 64, **changed: Columns) -> TokenTask:
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.parquet", changed.get(split, DATA))
    config = TaskConfig(name="conll2003", max_length=max_length)
    task = build_task(config, DataConfig(path=str(folder)), seed=0)
    assert isinstance(task, TokenTask)
    return task


def validation(data: TaskData) -> TaggedWords:
    split = data.evals["validation"]
    assert isinstance(split, TaggedWords)
    return split


def certain(split: TaggedWords, width: int) -> Tensor:
    """Outputs that give every label, and B-MISC wherever there is none."""
    labels = split.collate(range(len(split)))["labels"]
    classes = torch.full((len(split), width), B_MISC)
    classes[:, : labels.shape[1]] = torch.where(labels == IGNORED, B_MISC, labels)
    return torch.nn.functional.one_hot(classes, 9).float()


# --- figures ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("predicted", "true", "precision", "recall", "strict"),
    [
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 1, 1, 1),
        ("B-PER O O B-LOC", "B-PER I-PER O B-LOC", 1 / 2, 1 / 2, 1 / 2),  # half an entity is none
        ("B-PER I-PER O O", "B-PER I-PER O B-LOC", 1, 1 / 2, 2 / 3),
        ("B-PER I-PER B-ORG B-LOC", "B-PER I-PER O B-LOC", 2 / 3, 1, 4 / 5),
        # the right words and the wrong kind
        ("B-ORG I-ORG O B-LOC", "B-PER I-PER O B-LOC", 1 / 2, 1 / 2, 1 / 2),
        ("B-PER B-PER O B-LOC", "B-PER I-PER O B-LOC", 1 / 3, 1 / 2, 2 / 5),
        # An I tag without its B begins an entity, and so does one of another kind; strictly both are nothing.
        ("I-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 1, 1, 2 / 3),
        ("B-PER I-ORG O B-LOC", "B-PER I-PER O B-LOC", 1 / 3, 1 / 2, 1 / 2),
        ("O I-PER O B-LOC", "B-PER I-PER O B-LOC", 1 / 2, 1 / 2, 2 / 3),
        ("I-LOC O O O", "B-LOC O O O", 1, 1, 0),
        ("O O O O", "B-PER I-PER O B-LOC", 0, 0, 0),
        ("B-PER O O O", "O O O O", 0, 0, 0),
        ("O O O O", "O O O O", 0, 0, 0),
    ],
)
def test_entities_by_hand(predicted: str, true: str, precision: float, recall: float, strict: float) -> None:
    f1 = 2 * precision * recall / (precision + recall) if precision else 0.0
    assert entity_scores([predicted.split()], [true.split()]) == {
        "f1": pytest.approx(f1),
        "precision": pytest.approx(precision),
        "recall": pytest.approx(recall),
        "strict_f1": pytest.approx(strict),
    }


def test_entities_of_all_kinds_and_sentences_count_alike() -> None:
    predicted = [["B-PER", "O"], ["B-LOC", "B-LOC", "B-LOC"]]
    true = [["B-PER", "B-ORG"], ["B-LOC", "B-LOC", "O"]]
    assert entity_scores(predicted, true) == dict.fromkeys(ENTITY_METRICS, 0.75)


def test_an_entity_ends_with_its_sentence(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    data = {"tokens": [["anna"], ["lee"]], "ner_tags": [[B_PER], [B_PER]]}
    task = build(tmp_path, write, train=data, validation=data, test=data)
    split = validation(task.load(speller))
    outputs = certain(split, 64)
    outputs[1] = torch.nn.functional.one_hot(torch.tensor(I_PER), 9).float()
    # I-PER at the start of the second sentence does not go on with the first one's: it is an entity of its own.
    scores = {"f1": 1.0, "precision": 1.0, "recall": 1.0, "strict_f1": pytest.approx(2 / 3)}
    assert task.score(outputs, split) == scores


# --- alignment ----------------------------------------------------------------------------


def test_what_the_engine_asks(tmp_path: Path, write: Write) -> None:
    task = build(tmp_path, write)
    assert (task.problem, task.head) == ("tokens", "ForTokenClassification")
    assert (task.labels, task.num_labels) == (TAG_NAMES, 9)
    assert (task.primary, task.metrics) == ("f1", ("f1", "precision", "recall", "strict_f1"))
    logits = torch.randn(2, 3, 9)
    assert task.outputs(SimpleNamespace(logits=logits)) is logits


def test_the_first_piece_of_a_word_carries_its_label(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast
) -> None:
    split = build(tmp_path, write).load(speller).train
    batch = split.collate([1, 0])
    assert speller.convert_ids_to_tokens(batch["input_ids"][0][:6]) == ["[CLS]", "o", "##s", "##l", "##o", "[SEP]"]
    none = IGNORED
    anna, lee, met, bob = [B_PER, none, none, none], [I_PER, none, none], [O, none, none], [B_PER, none, none]
    assert batch["labels"].tolist() == [
        [none, B_LOC] + [none] * 14,
        [none, *anna, *lee, *met, *bob, O, none],
    ]
    assert split.targets.tolist() == [5, 1, 5]
    for row in range(3):
        assert (split.collate([row])["labels"] != none).sum() == split.targets[row]


def test_words_are_tokenised_as_if_given_one_by_one(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast
) -> None:
    words = ["jean-luc", "at", "3.50", "u.n.", "§", "rue,", "x"]
    data = {"tokens": [words], "ner_tags": [[B_PER, O, O, B_ORG, I_ORG, B_LOC, I_LOC]]}
    split = build(tmp_path, write, train=data, validation=data, test=data).load(speller).train
    expected = speller(words, is_split_into_words=True)
    batch = split.collate([0])
    assert batch["input_ids"][0].tolist() == expected["input_ids"]
    labels, before = [], None
    for word in expected.word_ids():
        labels.append(IGNORED if word in (None, before) else data["ner_tags"][0][word])
        before = word
    assert batch["labels"][0].tolist() == labels


def test_byte_level_tokenizers_see_the_spaces_between_words(tmp_path: Path, write: Write) -> None:
    letters = {letter: index + 1 for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE({"<pad>": 0} | letters, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    split = build(tmp_path, write).load(tokenizer).train
    batch = split.collate([0])
    assert tokenizer.decode(batch["input_ids"][0]) == "anna lee met bob ."
    labels = batch["labels"][0]
    assert labels[labels != IGNORED].tolist() == DATA["ner_tags"][0]
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0][labels != IGNORED]) == ["a", "l", "m", "b", "."]


@pytest.mark.parametrize(
    ("offsets", "words", "positions", "found"),
    [
        # the space before a word may be counted to its first piece, or be a token of its own
        ([(0, 0), (0, 2), (2, 5), (5, 6), (0, 0)], ["ab", "cd", "e"], [1, 2], [0, 1]),
        ([(0, 2), (2, 3), (3, 5), (5, 7)], ["ab", "cd", "e"], [0, 2, 3], [0, 1, 2]),
        # a word without pieces, an empty one, and one that is cut
        ([(0, 0), (0, 1), (4, 5), (0, 0)], ["a", "\x96", "b"], [1, 2], [0, 2]),
        ([(0, 1), (3, 4)], ["a", "", "b"], [0, 1], [0, 2]),
        ([(0, 1), (2, 3)], ["a", "bcd", "e"], [0, 1], [0, 1]),
        ([(0, 0), (0, 0)], ["a"], [], []),
    ],
)
def test_first_pieces(offsets: list[tuple[int, int]], words: list[str], positions: list[int], found: list[int]) -> None:
    tokens, indices = first_pieces(np.array(offsets), words)
    assert tokens.tolist() == positions
    assert indices.tolist() == found


def test_chunks_are_joined(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build(tmp_path, write)
    whole = validation(task.load(speller))
    monkeypatch.setattr(batching, "CHUNK", 2)
    chunked = validation(task.load(speller))
    assert torch.equal(whole.labelled, chunked.labelled)
    assert torch.equal(whole.tags, chunked.tags)
    assert torch.equal(whole.collate([0, 1, 2])["labels"], chunked.collate([0, 1, 2])["labels"])


# --- scores -------------------------------------------------------------------------------


def test_certain_outputs_find_all_entities(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write)
    data = task.load(speller)
    assert list(data.evals) == ["validation", "test"]
    assert data.notes == ()
    split = validation(data)
    outputs = certain(split, 64)
    assert task.score(outputs, split) == dict.fromkeys(task.metrics, 1.0)
    outputs[1, 1] = 0.0  # Oslo is missed: 4 of 5
    f1 = pytest.approx(8 / 9)
    assert task.score(outputs, split) == {"f1": f1, "precision": 1.0, "recall": pytest.approx(4 / 5), "strict_f1": f1}


def test_words_that_are_cut_count_as_missed(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, max_length=13)
    data = task.load(speller)
    # [CLS] anna lee met b [SEP], and [CLS] the un of new y [SEP]
    assert data.notes == tuple(
        f"{split}: 2 of 3 sentences are cut at 13 tokens, and no entity is found beyond"
        for split in ("train", "validation", "test")
    )
    assert data.train.targets.tolist() == [4, 1, 5]
    shorter = build(tmp_path, write, max_length=11)
    split = validation(shorter.load(speller))  # now without Bob and York: New alone is another entity
    assert split.targets.tolist() == [3, 1, 4]
    scores = shorter.score(certain(split, 11), split)
    f1 = pytest.approx(2 * 3 / (4 + 5))
    assert scores == {"f1": f1, "precision": pytest.approx(3 / 4), "recall": 3 / 5, "strict_f1": f1}


def test_outputs_that_are_not_finite_are_refused(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, write)
    split = validation(task.load(speller))
    outputs = certain(split, 64)
    outputs[2, 1, 0] = torch.inf
    with pytest.raises(NumericsError, match="1 of 3 examples are not finite"):
        task.score(outputs, split)


def test_unequal_micro_batches_add_up(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write)
    split = task.load(speller).train
    student, teacher = torch.randn(2, 3, 64, 9, generator=torch.Generator().manual_seed(0))
    count = split.targets.sum() / 2

    def losses(rows: list[int]) -> Tensor:
        labels = split.collate(rows)["labels"]
        ours, theirs = student[rows, : labels.shape[1]], teacher[rows, : labels.shape[1]]
        return torch.stack(
            [
                task.loss(ours, labels, count=count),
                task.logit_loss(ours, theirs, labels, temperature=2.0, count=count),
            ]
        )

    whole = losses([0, 1, 2])
    assert torch.allclose(losses([1]) + losses([2, 0]), whole)
    by_hand = sum(
        -student[row, position].log_softmax(-1)[label]
        for row in range(3)
        for position, label in enumerate(split.collate([row])["labels"][0].tolist())
        if label != IGNORED
    )
    assert whole[0].item() == pytest.approx(float(by_hand) / 5.5, rel=1e-5)


# --- sources and mistakes -----------------------------------------------------------------


def test_tags_may_be_numbers_that_a_table_with_gaps_wrote(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast
) -> None:
    floats = DATA | {"ner_tags": [[float(tag) for tag in sentence] for sentence in DATA["ner_tags"]]}
    read = build(tmp_path / "floats", write, train=floats, validation=floats, test=floats).load(speller)
    assert torch.equal(read.train.labels, build(tmp_path / "ids", write).load(speller).train.labels)


def test_tags_may_be_names(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    named = DATA | {"ner_tags": [[TAG_NAMES[tag] for tag in sentence] for sentence in DATA["ner_tags"]]}
    by_name = build(tmp_path / "names", write, train=named, validation=named, test=named).load(speller)
    by_id = build(tmp_path / "ids", write).load(speller)
    assert torch.equal(by_name.train.labels, by_id.train.labels)


def test_the_hub_by_default(monkeypatch: pytest.MonkeyPatch, speller: PreTrainedTokenizerFast) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_dict(DATA | {"pos_tags": [[0], [0], [0]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    build_task(TaskConfig(name="conll2003"), DataConfig(), seed=0).load(speller)
    build_task(TaskConfig(name="conll2003"), DataConfig(revision="abc"), seed=0).load(speller)
    assert asked == [
        ("eriktks/conll2003", None, split, revision)
        for revision in ("refs/convert/parquet", "abc")
        for split in ("validation", "test", "train")
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ner_tags": [[0] * 5, [9], [0] * 5]}, r"row 1 \(from 0\), column 'ner_tags': .* from 0 to 8, found \[9\]"),
        ({"ner_tags": [[0] * 5, [-1], [0] * 5]}, r"row 1 .*found \[-1\]"),
        (
            {"ner_tags": [["O"] * 5, ["B-DATE"], ["O"] * 5]},
            r"row 1 .*one of O, B-PER, .*found \['B-DATE'\]; the column holds B-DATE, O$",
        ),
        ({"ner_tags": [[0] * 5, [True], [0] * 5]}, r"row 1 .*found \[True\]"),
        ({"ner_tags": [[0] * 5, [None], [0] * 5]}, r"row 1 .*found \[None\]"),
        ({"ner_tags": [[0] * 5, 5, [0] * 5]}, r"row 1 .*'ner_tags': .*found 5; "),
        ({"ner_tags": [[0] * 5, [0], [0] * 4]}, r"row 2 \(from 0\) has 5 words and 4 tags"),
        ({"tokens": [["a"], [], ["b"]], "ner_tags": [[0], [], [0]]}, r"row 1 .*'tokens': expected at least one word"),
        ({"tokens": [["a"], ["b", None], ["c"]]}, r"row 1 .*'tokens': expected a list of words"),
        ({"tokens": ["a b", "c", "d"]}, r"row 0 .*'tokens': expected a list of words, found 'a b'"),
        (
            {"ner_tags": [[O, I_PER, O, B_ORG, I_ORG], [B_LOC], [B_LOC, I_LOC, I_ORG, I_ORG, I_LOC]]},
            r"3 tags are not IOB2: the first, I-PER of word 1 in row 0 \(both from 0\), continues no entity",
        ),
        ({"ner_tags": [[0] * 5, [I_MISC], [0] * 5]}, r"1 tags are not IOB2: the first, I-MISC of word 0 in row 1"),
        ({"id": [], "tokens": [], "ner_tags": []}, "the split is empty"),
    ],
)
def test_values_that_cannot_be(
    changed: Columns, message: str, tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast
) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", DATA | changed if split == "test" else DATA)
    task = build_task(TaskConfig(name="conll2003"), DataConfig(path=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=message) as caught:
        task.load(speller)
    assert "test.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tags_that_are_never_trained_on(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    other = DATA | {"ner_tags": [[B_PER, I_PER, O, B_PER, O], [B_MISC], [O, B_ORG, I_ORG, B_LOC, I_LOC]]}
    with pytest.raises(
        DataError, match=r"test\.parquet: tags I-ORG, B-MISC do not occur in the training .*train\.parq"
    ):
        build(tmp_path, write, test=other).load(speller)
    assert build(tmp_path, write, train=other, validation=other).load(speller).notes == ()


def test_tags_beyond_the_first_training_examples(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast
) -> None:
    build(tmp_path, write)
    config = DataConfig(path=str(tmp_path), max_train_examples=1)
    data = build_task(TaskConfig(name="conll2003", max_length=64), config, seed=0).load(speller)
    assert data.notes == (
        "train: the first 1 of 3 examples",
        "validation: tags B-ORG, B-LOC, I-LOC are not in the training examples",
        "test: tags B-ORG, B-LOC, I-LOC are not in the training examples",
    )


@pytest.mark.parametrize("column", ["tokens", "ner_tags"])
def test_missing_columns(column: str, tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    data = {name: values for name, values in DATA.items() if name != column}
    with pytest.raises(DataError, match=f"no column '{column}' of task 'conll2003'; there is id, "):
        build(tmp_path, write, train=data).load(speller)


def test_both_evaluation_splits_are_needed(tmp_path: Path, write: Write) -> None:
    build(tmp_path, write)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(DataError, match="no file for split 'test'"):
        build_task(TaskConfig(name="conll2003"), DataConfig(path=str(tmp_path)), seed=0)


def test_slow_tokenizers_are_refused(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ArchitectureError, match=r"task 'conll2003' needs the places of tokens .* a fast one"):
        build(tmp_path, write).load(speller)


def test_a_metric_that_the_task_has_not() -> None:
    with pytest.raises(ConfigError, match="task 'conll2003' has no such metric; it has f1, precision, recall"):
        build_task(TaskConfig(name="conll2003", metric="zzz"), DataConfig(), seed=0)
