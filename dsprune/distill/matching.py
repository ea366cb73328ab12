"""Which student layer learns from which teacher layer (CoFi, section 3.3).

Decided from distances reduced over all ranks and accumulation steps, so that every rank decides the
same and a batch may be split in any way. To need no collective of its own the match of a step uses
the distances of the step before, with the layers that live now; the paper takes the current batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dsprune.errors import ConfigError

__all__ = ["UNMATCHED", "default_teacher_layers", "match_fixed", "match_free", "match_layers", "match_monotone"]

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


def match_fixed(teacher_layers: Sequence[int], live: Sequence[bool], sources: Sequence[int]) -> list[int]:
    """Each teacher layer teaches the student layer that stands in its place, if that one lives.

    Args:
        teacher_layers: counted from 1.
        live: per student layer, whether it may learn.
        sources: per student layer, the dense layer that it was (counted from 0).
    """
    place = {source + 1: i for i, source in enumerate(sources) if live[i]}
    return [place.get(layer, UNMATCHED) for layer in teacher_layers]


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

    Where the live layers run out, the remaining lower teacher layers stay unmatched; the code indexes
    out of range there, and reads liveness by position in a sorted list.
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
    teacher_layers: Sequence[int],
    live: Sequence[bool],
    sources: Sequence[int],
    distances: Tensor | None,
) -> list[int]:
    """The student layer (from 0, or `UNMATCHED`) for each teacher layer, by one of the three rules.

    Before any distance is known the dynamic rules begin with the fixed match.
    """
    if rule == "fixed" or distances is None:
        return match_fixed(teacher_layers, live, sources)
    return match_free(distances, live) if rule == "free" else match_monotone(distances, live)
