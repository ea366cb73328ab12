"""Landing on a speedup: the choice that is to be exported is measured, and its target corrected by what that says.

A latency table predicts; what counts is the model that is exported. Its time, beside the dense model's, says how far
the prediction is off there, and the next choice is made at the target that ought to make up for it (a secant step on
logarithms: times are scales). A few such steps are taken, and the nearest choice is exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsprune.structure import Budget, Selection

__all__ = ["TimedLanding", "land_on_speedup"]

CORRECTIONS = 3
"""Choices that are made anew at most."""
TOLERANCE = 0.05
"""How far the measured speedup may be from the one that was asked for, as a share of it."""
CLOSE = 0.02
"""From when on a choice is not made anew: measured again, it is to be within the tolerance still."""
STEEPEST = 3.0
"""How many times as fast as the prediction the measured time may be taken to change, or as slowly."""
MOST = 1 - 1e-6
"""Share of the time that can be aimed at to go."""


@dataclass(frozen=True)
class TimedLanding:
    """How a choice of units came to the speedup that was asked for.

    Attributes:
        asked: how many times as fast as the dense model.
        predicted: of the choice that is exported, by the latency table.
        measured: of the same, beside the dense model, before export.
        tried: (predicted, measured) of every choice that was measured, the first one made as if the table were right.
        coarse: whether no other choice was to be had nearer by.
    """

    asked: float
    predicted: float
    measured: float
    tried: tuple[tuple[float, float], ...]
    coarse: bool = False

    @property
    def off(self) -> float:
        """How far the measured speedup is from the one that was asked for, as a share of it; below 0 it is slower."""
        return self.measured / self.asked - 1

    @property
    def missed(self) -> bool:
        """Whether that is more than the tolerance."""
        return abs(self.off) > TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with what people are told."""
        return {
            "asked": self.asked,
            "predicted": self.predicted,
            "measured": self.measured,
            "tried": [list(pair) for pair in self.tried],
            "missed": self.missed,
            "told": self.describe(),
        }

    def describe(self) -> str:
        """What was asked, predicted and measured, and why it is not nearer, in one line."""
        line = f"asked for {self.asked:g}x, predicted {self.predicted:.2f}x, measured {self.measured:.2f}x"
        if len(self.tried) > 1:
            line += f" (choices measured one after the other: {', '.join(f'{m:.2f}x' for _, m in self.tried)})"
        if not self.missed:
            return line
        why = (
            "the units of this model are coarser than that, or no more of them can go"
            if self.coarse
            else f"{CORRECTIONS} corrections did not come nearer: measured times vary, or the table is far off here"
        )
        return f"{line}: {100 * abs(self.off):.0f}% too {'slow' if self.off < 0 else 'fast'}, because {why}"


def land_on_speedup(
    budget: Budget, select: Callable[[float], Selection], measure: Callable[[Selection], float]
) -> tuple[Selection, TimedLanding]:
    """The choice whose measured speedup is nearest to what a budget allows, of those that are tried.

    Args:
        budget: of milliseconds.
        select: makes a choice for a target: the share of the dense model's time that is to go.
        measure: says how many times as fast as the dense model a choice is; on every rank the same.
    """
    asked, target = 1 / budget.share, budget.target
    choices: list[Selection] = []
    tried: list[tuple[float, float]] = []
    coarse = False
    for _ in range(1 + CORRECTIONS):
        selection = select(target)
        if any(_same(selection, other) for other in choices):
            coarse = True
            break
        predicted = 1 / (1 - budget.removed(selection.gates))
        choices.append(selection)
        tried.append((predicted, measure(selection)))
        if abs(tried[-1][1] / asked - 1) <= CLOSE:
            break
        target = _corrected(asked, tried)
    best = min(range(len(tried)), key=lambda i: abs(math.log(tried[i][1] / asked)))
    return choices[best], TimedLanding(asked, *tried[best], tuple(tried), coarse)


def _corrected(asked: float, tried: list[tuple[float, float]]) -> float:
    """The target at which the measured speedup ought to be the one that was asked for."""
    predicted, measured = (math.log(value) for value in tried[-1])
    slope = 1.0
    if len(tried) > 1:
        before, then = (math.log(value) for value in tried[-2])
        change = predicted - before
        slope = (measured - then) / change if change else 1.0
        slope = min(STEEPEST, max(1 / STEEPEST, slope))
    wanted = predicted + (math.log(asked) - measured) / slope
    return min(MOST, max(0.0, 1 - math.exp(-wanted)))


def _same(one: Selection, other: Selection) -> bool:
    ours, theirs = one.hard(), other.hard()
    return all(torch.equal(gate, theirs[kind]) for kind, gate in ours.items())
