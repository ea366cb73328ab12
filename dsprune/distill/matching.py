"""Which student layer learns from which teacher layer (CoFi, section 3.3).

Decided from distances reduced over all ranks and accumulation steps, so that every rank decides the
same and a batch may be split in any way. To need no collective of its own the match of a step uses
the distances of the step before, with the layers that live now; the paper takes the current batch (measured in
`methods/cofi.py`).

Teacher and student may be of unlike depth. Then the student layer in the place of a teacher layer is the one
at the same height of its stack: layer m of S beside layer m * T / S of T (TinyBERT, arXiv 1909.10351, section
3.1, and MLPruning's code, both for a T that S divides), rounded where that is no whole number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from dsprune.config import DistillConfig
from dsprune.errors import ArchitectureError, ConfigError

__all__ = [
    "UNMATCHED",
    "LayerPlan",
    "default_teacher_layers",
    "draw_layers",
    "match_fixed",
    "match_free",
    "match_layers",
    "match_monotone",
    "plan_layers",
]

UNMATCHED = -1
"""A teacher layer that no student layer can learn from, all its candidates being removed."""


def default_teacher_layers(num_layers: int) -> tuple[int, ...]:
    """Four evenly spaced layers ending with the last, counted from 1: (3, 6, 9, 12) of twelve."""
    count = min(4, num_layers)
    return tuple(round(num_layers * (i + 1) / count) for i in range(count))


def check_teacher_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Teacher layers, ascending.

    Raises:
        ConfigError: a layer that the teacher does not have, or one named twice.
    """
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] > num_layers:
        raise ConfigError(
            f"distill.teacher_layers = {list(layers)}: name layers from 1 to {num_layers} (0: the embeddings), each "
            "once, ascending"
        )
    return tuple(layers)


@dataclass(frozen=True)
class LayerPlan:
    """Teacher layers that may teach, and what stands in their place.

    Attributes:
        layers: ascending, counted from 1 over all stacks; 0 stands for the embeddings.
        partners: for each of them the layer of the dense student in its place, counted likewise.
    """

    layers: tuple[int, ...]
    partners: tuple[int, ...]


def plan_layers(distill: DistillConfig, student: Sequence[int], teacher: Sequence[int]) -> LayerPlan:
    """Which layers of a teacher are to teach which of a student.

    Args:
        distill: what was asked for.
        student: for each layer of the dense student, the stack that it stands in (0, or 1 for a decoder beside an
            encoder).
        teacher: likewise for the teacher.

    Raises:
        ConfigError: layers that one of the two does not have, or two that teach the same one by a fixed match.
        ArchitectureError: an encoder-decoder and a model of one stack.
    """
    if set(student) != set(teacher):
        raise ArchitectureError(
            f"the teacher has {len(set(teacher))} stack(s) of layers and the model {len(set(student))}: an "
            "encoder-decoder and a model of one stack cannot teach each other layer by layer; set distill.layers and "
            "distill.attentions to 0"
        )
    if distill.layer_pairs is not None:
        return _plan_pairs(distill.layer_pairs, student, teacher)
    depth = len(teacher)
    every = tuple(range(1, depth + 1)) if distill.teacher_draw != "all" else default_teacher_layers(depth)
    layers = check_teacher_layers(every if distill.teacher_layers is None else distill.teacher_layers, depth)
    partners = tuple(_partner(layer, student, teacher) if layer > 0 else 0 for layer in layers)
    if distill.match == "fixed" and len(set(partners)) < len(partners):
        if distill.teacher_layers is None and distill.teacher_draw == "all":
            layers = tuple(layers[_last(partners, partner)] for partner in sorted(set(partners)))
            return LayerPlan(layers, tuple(sorted(set(partners))))
        _refuse_crowd(layers, partners)
    return LayerPlan(layers, partners)


def _last(values: Sequence[int], value: int) -> int:
    return max(i for i, other in enumerate(values) if other == value)


def _refuse_crowd(layers: Sequence[int], partners: Sequence[int]) -> None:
    crowded = next(partner for partner in partners if partners.count(partner) > 1)
    theirs = [str(layer) for layer, partner in zip(layers, partners, strict=True) if partner == crowded]
    raise ConfigError(
        f"distill.teacher_layers = {list(layers)}: in a fixed match layers {' and '.join(theirs)} of the teacher both "
        f"stand beside layer {crowded} of the student, which is less deep: name one of them, or say distill.layer_pairs"
    )


def _partner(layer: int, student: Sequence[int], teacher: Sequence[int]) -> int:
    """The layer of the student at the height of one of the teacher's, within its stack; both counted from 1."""
    stack = teacher[layer - 1]
    place = layer - teacher.index(stack)
    ours, theirs = list(student).count(stack), list(teacher).count(stack)
    return student.index(stack) + max(1, (2 * place * ours + theirs) // (2 * theirs))


def _plan_pairs(pairs: Sequence[tuple[int, int]], student: Sequence[int], teacher: Sequence[int]) -> LayerPlan:
    said = f"distill.layer_pairs = {[list(pair) for pair in pairs]}"
    if not pairs or len(set(pairs)) < len(pairs):
        raise ConfigError(f"{said}: name at least one pair [student layer, teacher layer], each once")
    for ours, theirs in pairs:
        if not (0 <= ours <= len(student) and 0 <= theirs <= len(teacher)):
            raise ConfigError(
                f"{said}: [{ours}, {theirs}] names a layer that is not there: the student has {len(student)} and the "
                f"teacher {len(teacher)} (0: the embeddings)"
            )
        if (ours == 0) != (theirs == 0):
            raise ConfigError(f"{said}: [{ours}, {theirs}]: the embeddings, 0, pair with the embeddings alone")
        if ours > 0 and student[ours - 1] != teacher[theirs - 1]:
            raise ConfigError(f"{said}: [{ours}, {theirs}]: layers of an encoder and of a decoder do not pair")
    ordered = sorted(pairs, key=lambda pair: pair[::-1])
    return LayerPlan(tuple(theirs for _, theirs in ordered), tuple(ours for ours, _ in ordered))


def draw_layers(rule: Literal["all", "random", "quarters"], count: int, seed: int) -> list[int]:
    """Which of `count` teacher layers, by position, teach at one step: CoFi's code, versions 5 and 6.

    Four at random, or one at random from each quarter; the lowest of them is raised to the end of the first quarter,
    or to the third layer where that is lower (of twelve layers: the third). In the code a layer may then stand twice,
    or out of order; here each teaches once, in order.

    Args:
        rule: all of them, random (version 5), or quarters (version 6).
        count: number of layers to draw from.
        seed: of this step.

    Returns:
        Positions, ascending.
    """
    if rule == "all":
        return list(range(count))
    generator = random.Random(seed)
    ends = default_teacher_layers(count)
    if rule == "random":
        drawn = sorted(generator.sample(range(count), len(ends)))
    else:
        drawn = [generator.sample(range(*quarter), 1)[0] for quarter in pairwise((0, *ends))]
    return sorted({max(drawn[0], min(3, ends[0]) - 1), *drawn[1:]})


def match_fixed(partners: Sequence[int], live: Sequence[bool], sources: Sequence[int]) -> list[int]:
    """Each teacher layer teaches the student layer that stands in its place, if that one lives.

    Args:
        partners: for each teacher layer the dense student layer in its place, counted from 1.
        live: per student layer, whether it may learn.
        sources: per student layer, the dense layer that it was (counted from 0).
    """
    place = {source + 1: i for i, source in enumerate(sources) if live[i]}
    return [place.get(layer, UNMATCHED) for layer in partners]


def match_free(distances: Tensor, live: Sequence[bool]) -> list[int]:
    """Each teacher layer teaches the nearest live student layer (the code's v3, restricted to live layers).

    Args:
        distances: [teacher layers, student layers].
        live: per student layer, whether it may learn.
    """
    candidates = [i for i, alive in enumerate(live) if alive]
    if not candidates:
        return [UNMATCHED] * len(distances)
    return [min(candidates, key=row.__getitem__) for row in distances.tolist()]


def match_monotone(distances: Tensor, live: Sequence[bool]) -> list[int]:
    """From the top down, each teacher layer teaches the nearest live layer strictly below the last pick (v4).

    Where the live layers run out, the remaining lower teacher layers stay unmatched. In the code they teach the
    last pick as well, and where there is no pick yet it indexes out of range. It also reads liveness by position in
    a sorted list, so that removed layers may learn and live ones may not.
    """
    match = [UNMATCHED] * len(distances)
    ceiling = len(live)
    for teacher in reversed(range(len(distances))):
        row = distances[teacher].tolist()
        candidates = [i for i in range(ceiling) if live[i]]
        if not candidates:
            break
        ceiling = match[teacher] = min(candidates, key=row.__getitem__)
    return match


def match_layers(
    rule: Literal["fixed", "free", "monotone"],
    *,
    partners: Sequence[int],
    live: Sequence[bool],
    sources: Sequence[int],
    distances: Tensor | None,
) -> list[int]:
    """The student layer (from 0, or `UNMATCHED`) for each teacher layer, by one of the three rules.

    Before any distance is known the dynamic rules begin with the fixed match.
    """
    if rule == "fixed" or distances is None:
        return match_fixed(partners, live, sources)
    return match_free(distances, live) if rule == "free" else match_monotone(distances, live)
