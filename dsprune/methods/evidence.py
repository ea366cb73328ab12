"""What a method wants to see of the model at a step: the trainer serves it, at every ZeRO stage."""

from __future__ import annotations

from typing import Literal

__all__ = ["Evidence", "cost_of"]

Evidence = Literal["none", "gradient", "probe", "squares", "loss"]
"""What `Method.learn` is given of a step:

- `none`: nothing.
- `gradient`: by kind of gate, the gradient of the training loss: that of the training pass itself.
- `probe`: by kind, the gradient of the loss without its layerwise part, in a pass of its own (gradient separation).
- `squares`: by kind, the sum over the examples of the step of the squared gradient that one example's loss on its
  labels has, float64. It does not depend on how a batch was cut: every example is passed alone, without dropout.
- `loss`: `loss`, [trials]: the mean loss over the examples of the step under each set of gates that `Method.gates`
  gave, one after another along the first axis. Forward passes only, without dropout.

All are the same on every rank: gradients and losses are means over ranks and accumulation steps, unscaled.
"""

COSTS: dict[Evidence, str] = {
    "none": "nothing",
    "gradient": "nothing beside the training pass",
    "probe": "a forward pass, and a backward pass that stops at the gates",
    "squares": "a forward pass, and a backward pass that stops at the gates, for each example by itself",
    "loss": "a forward pass for each set of gates that is tried",
}


def cost_of(evidence: Evidence, *, trains_weights: bool) -> str:
    """What a step's evidence costs, in words.

    Args:
        evidence: wanted.
        trains_weights: whether there is a training pass; without one, gradients have a pass of their own.
    """
    return COSTS["probe" if evidence == "gradient" and not trains_weights else evidence]
