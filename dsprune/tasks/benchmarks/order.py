"""A generated task that needs no files: does the hypothesis follow from the premise?

    Anna is older than Ben and Carl is louder than Dora.    Anna is older.    follows
    Ben is older than Anna and Dora is louder than Carl.    Anna is older.    contradicts

The label is in the order of the words and nowhere else: examples come as twins, one hypothesis and
two premises, in one of which every comparison is turned around; one twin follows and the other
contradicts. Every bag of words belongs to exactly one pair of twins. Hence for each bag of words, of
either sentence or of both, the two labels are equally likely, and whatever sees only the bag is right
half of the time. The premise alone says nothing either.

Three kinds of premises, equally likely: one comparison; two, of different people by different
properties; two that make a chain of three people, in any order, with a hypothesis about its first or
last.

Splits are disjoint: a bag of words belongs to training or validation by its checksum. People recur
over splits, pairs of sentences cannot. The examples depend on the seed alone, and a smaller split is
a prefix of a larger one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError
from dsprune.tasks.base import Task, choose_metric
from dsprune.tasks.kinds.sequence import SequenceTask
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["LABELS", "NUM_TRAIN", "NUM_VALIDATION", "Example", "build_order", "generate"]

NUM_TRAIN = 8000
NUM_VALIDATION = 1000
VALIDATION_SHARE = 8
"""One bag of words in so many belongs to the validation split."""
LABELS = ("contradicts", "follows")

# Names and words that are single tokens for BERT's uncased vocabulary, which keeps sequences short.
PEOPLE = tuple(
    "Adam Alice Amy Anna Ben Bob Brian Bruce Carl Cathy Chris Clara Daniel David Diana Dora Ellen Emma Eric Eva "
    "Felix Fiona Frank Fred George Gina Grace Greg Hannah Harry Helen Henry Ian Irene Isabel Ivan Jack James Jane "
    "Julia Karen Karl Kate Kevin Laura Leo Linda Louis Maria Mark Martin Molly Neil Nick Nina Nora Oliver Olga "
    "Oscar Pamela Paul Peter Quinn Rachel Robert Rose Ruth Sam Sarah Simon Steve Thomas Tim Tina Tom Ursula Vera "
    "Victor Vincent Walter Wendy Will".split()
)
PROPERTIES = (
    ("older", "younger"),
    ("taller", "shorter"),
    ("faster", "slower"),
    ("richer", "poorer"),
    ("stronger", "weaker"),
    ("heavier", "lighter"),
    ("louder", "quieter"),
    ("earlier", "later"),
)


class Example(NamedTuple):
    """One premise and hypothesis; `label` indexes `LABELS`."""

    premise: str
    hypothesis: str
    label: int


class Fact(NamedTuple):
    """`greater` is `word` than `lesser`."""

    greater: str
    word: str
    lesser: str

    def turned(self) -> Fact:
        """The two people in each other's place."""
        return Fact(self.lesser, self.word, self.greater)

    def __str__(self) -> str:
        return f"{self.greater} is {self.word} than {self.lesser}"


def generate(seed: int, *, num_train: int, num_validation: int) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, twins side by side; odd numbers are rounded down to whole twins.

    Args:
        seed: decides everything else.
        num_train: training examples.
        num_validation: validation examples.
    """
    rng = random.Random(f"order/{seed}")
    train: list[Example] = []
    validation: list[Example] = []
    wanted = ((train, num_train // 2 * 2), (validation, num_validation // 2 * 2))
    seen: set[str] = set()
    while any(len(split) < size for split, size in wanted):
        twins = _twins(rng)
        bag = " ".join(sorted(f"{twins[0].premise} {twins[0].hypothesis}".replace(".", "").split()))
        split, size = wanted[zlib.crc32(bag.encode()) % VALIDATION_SHARE == 0]
        if bag not in seen and len(split) < size:
            split.extend(twins)
        seen.add(bag)
    return train, validation


def _twins(rng: random.Random) -> tuple[Example, Example]:
    """Two examples of the same words and opposite labels."""
    first, second, third, fourth = rng.sample(PEOPLE, 4)
    word, other_word = (rng.choice(pair) for pair in rng.sample(PROPERTIES, 2))
    facts = [
        Fact(first, word, second),
        *rng.choice(([], [Fact(third, other_word, fourth)], [Fact(second, word, third)])),
    ]
    rng.shuffle(facts)
    hypothesis = f"{first} is {word}."
    return (
        Example(_premise(facts), hypothesis, LABELS.index("follows")),
        Example(_premise([fact.turned() for fact in facts]), hypothesis, LABELS.index("contradicts")),
    )


def _premise(facts: Sequence[Fact]) -> str:
    return " and ".join(map(str, facts)) + "."


def build_order(task: TaskConfig, data: DataConfig, seed: int) -> Task:
    """The generated task; `data.max_train_examples` and `data.max_eval_examples` set its sizes.

    Raises:
        ConfigError: a metric that the task has not, or settings of data that it does not read.
    """
    given = [key for key in ("path", "revision", "columns", "validation_share") if getattr(data, key) not in (None, {})]
    if given:
        raise ConfigError(f"data.{given[0]}: task 'order' is generated and reads no data: drop it")
    sizes = {
        "num_train": data.max_train_examples or NUM_TRAIN,
        "num_validation": data.max_eval_examples or NUM_VALIDATION,
    }
    too_small = [key for key, size in zip(("train", "eval"), sizes.values(), strict=True) if size < 2]
    if too_small:
        raise ConfigError(f"data.max_{too_small[0]}_examples: task 'order' comes in pairs: at least 2")

    def read(progress: bool) -> Splits:
        train, validation = generate(seed, **sizes)
        return Splits(_as_split("train", train, seed), {"validation": _as_split("validation", validation, seed)})

    return SequenceTask(
        name=task.name,
        labels=LABELS,
        metrics=("accuracy",),
        primary=choose_metric(task.name, ("accuracy",), task.metric),
        columns=("premise", "hypothesis"),
        max_length=task.max_length,
        read=read,
    )


def _as_split(name: str, examples: list[Example], seed: int) -> Split:
    columns: Mapping[str, list[str | int]] = {
        field: [example[index] for example in examples]
        for field, index in (("premise", 0), ("hypothesis", 1), ("label", 2))
    }
    return Split(name, f"generated task 'order' ({name}, seed {seed})", columns)
