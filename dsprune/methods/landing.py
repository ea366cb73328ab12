"""Landing on the target: from scores and a hunch of how many units to keep, hard gates of the right cost.

Learned probabilities meet a target in expectation; the exported model has a parameter count. The
difference is closed here, by one threshold shift for all fine units and then unit by unit, so that
what was asked for is what is exported.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsprune.structure import Budget, Gates

__all__ = ["land"]

ROOM = 1.0
"""Shift of the threshold, a logit, within which units may still be given back."""
MOST = 500
"""Units that are tried."""


def land(
    hard_gates: Callable[[float], Gates],
    budget: Budget,
    scores: Gates,
    *,
    reach: float,
) -> dict[str, Tensor]:
    """Gates whose sparsity is the lowest one at or above the target that this ordering of units gives.

    Args:
        hard_gates: gates (zero: removed) for a shift of the threshold; a higher shift keeps a
            superset of units.
        budget: says what gates remove, and what they are to.
        scores: per kind, the order in which units between two neighbouring shifts are given back.
        reach: largest shift to try, either way.

    Returns:
        Gates. If even the densest choice is sparser than the target, that one; if even the sparsest
        is denser, that one: the caller measures and says so.
    """
    low, high = -reach, reach
    sparse, dense = hard_gates(low), hard_gates(high)
    if budget.removed(dense) >= budget.target:
        return dict(dense)
    if budget.removed(sparse) <= budget.target:
        return dict(sparse)
    for _ in range(40):
        middle = (low + high) / 2
        gates = hard_gates(middle)
        if budget.removed(gates) >= budget.target:
            low, sparse = middle, gates
        else:
            high, dense = middle, gates
    gates = _fill(sparse, dense, budget, scores)
    # What separates the two may be one large unit, a head. Smaller ones fill the rest of the room.
    return _fill(gates, hard_gates(high + ROOM), budget, scores)


def _fill(sparse: Gates, dense: Gates, budget: Budget, scores: Gates) -> dict[str, Tensor]:
    """Give back units of `dense` that `sparse` lacks, best first, as long as the target still holds."""
    missing = [
        (float(scores[kind][tuple(index)]), kind, tuple(index))
        for kind in sparse
        for index in ((dense[kind] != 0) & (sparse[kind] == 0)).nonzero().tolist()
    ]
    gates = {kind: gate.clone() for kind, gate in sparse.items()}
    for _, kind, index in sorted(missing, reverse=True)[:MOST]:
        gates[kind][index] = dense[kind][index]
        if budget.removed(gates) < budget.target:
            gates[kind][index] = torch.zeros(())
    return gates
