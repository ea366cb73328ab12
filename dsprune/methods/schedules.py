"""How targets move over the steps of a run."""

from __future__ import annotations

__all__ = ["cubic_density", "linear_target", "warmup_and_decay"]


def linear_target(step: int, *, target: float, warmup_steps: int) -> float:
    """Target `step` steps after pruning began: from 0 to `target` in `warmup_steps`, then constant."""
    if warmup_steps <= 0:
        return target
    return target * min(1.0, max(0, step) / warmup_steps)


def cubic_density(step: int, *, start: int, end: int, final: float) -> float:
    """Share that is kept: 1 up to `start`, then falling fast and ever more slowly to `final` at `end`.

    Zhu and Gupta (arXiv 1710.01878), equation 1, as in GRAIN (arXiv 2212.07634), section 3.2.
    """
    if step < start:
        return 1.0
    if step >= end:
        return final
    return final + (1 - final) * (1 - (step - start) / (end - start)) ** 3


def warmup_and_decay(step: int, *, total: int, warmup: float) -> float:
    """Factor of a learning rate: rises linearly over the first share `warmup` of the steps, then falls to zero."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (total - step) / max(1, total - rising))
