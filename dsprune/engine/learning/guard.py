"""The numerics guard: what is not finite, or out of its range, is named, and stops the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsprune.engine.ranks.world import World
from dsprune.errors import NumericsError

__all__ = ["check_gates", "check_norm", "check_skipped", "not_finite"]

MAX_SKIPPED_FP16 = 25
"""Consecutive steps that fp16 loss scaling may skip before a run is given up; other precisions may skip none."""
SLACK = 1e-6
"""How far rounding may carry a gate out of [0, 1]."""


def not_finite(world: World, where: str, sums: Mapping[str, Tensor], examples: list[int]) -> NumericsError:
    """The error for a step whose reduced numbers are not finite. Collective: all ranks must call.

    Args:
        world: the ranks.
        where: stage and step.
        sums: what this rank brought into the reduction.
        examples: this rank's training examples of the step.
    """
    bad = [name for name, value in sums.items() if not bool(value.isfinite().all())]
    ranks = world.gather((bad, examples))
    guilty = {rank: parts for rank, (parts, _) in enumerate(ranks) if parts}
    details = {
        "where": where,
        "ranks": {str(rank): {"not_finite": parts, "examples": ranks[rank][1]} for rank, parts in guilty.items()},
    }
    if not guilty:
        return NumericsError(f"{where}: a sum over ranks is not finite: lower the learning rate", details)
    first, parts = next(iter(guilty.items()))
    return NumericsError(
        f"{where}: not finite on rank {first}: {', '.join(parts)}: lower the learning rate, or look at the examples "
        "named in numerics.json",
        details,
    )


def check_skipped(where: str, skipped: int, *, fp16: bool) -> None:
    """Give up when too many steps in a row were not applied.

    Raises:
        NumericsError: saying how many.
    """
    if skipped > (MAX_SKIPPED_FP16 if fp16 else 0):
        cure = "use bf16, or a lower learning rate" if fp16 else "lower the learning rate"
        raise NumericsError(
            f"{where}: the engine skipped {skipped} step(s) in a row over gradients that are not finite: {cure}"
        )


def check_norm(where: str, norm: Any) -> None:
    """Stop over gradients of the weights that are not finite; fp32 engines apply them without a word.

    Args:
        where: stage and step.
        norm: global norm of the gradients, the same on all ranks; None where the engine has none.

    Raises:
        NumericsError: it is not finite.
    """
    if norm is not None and not torch.isfinite(torch.as_tensor(float(norm))):
        raise NumericsError(
            f"{where}: the gradients of the weights are not finite: lower the learning rate or clip them (clip)",
            {"where": where, "gradient_norm": str(float(norm))},
        )


def check_gates(where: str, gates: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """See that gates are in [0, 1] and what they come from is finite.

    Args:
        where: stage and step.
        gates: values by kind; the first dimension counts layers, but for `hidden`.
        state: the method's own tensors by name.

    Raises:
        NumericsError: naming kind, layer and unit.
    """
    for kind, gate in gates.items():
        wrong = ~((gate >= -SLACK) & (gate <= 1 + SLACK))
        if bool(wrong.any()):
            raise NumericsError(
                f"{where}: {_place(kind, gate, wrong)}, outside [0, 1]: lower the method's learning rate"
            )
    for name, value in state.items():
        wrong = ~value.isfinite()
        if bool(wrong.any()):
            raise NumericsError(f"{where}: {_place(name, value, wrong)}: lower the method's learning rate")


def _place(name: str, value: Tensor, wrong: Tensor) -> str:
    index = [int(i) for i in wrong.nonzero()[0]]
    layered = len(index) > 1 or name in ("attn", "ffn")
    spot = [f"layer {index[0]}", *(f"unit {i}" for i in index[1:])] if layered else [f"unit {i}" for i in index]
    return f"'{name}' at {', '.join(spot) or 'its only value'} is {float(value.detach()[tuple(index)]):g}"
