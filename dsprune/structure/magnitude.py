"""How large the weights of each unit are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsprune.structure.gating import by_head
from dsprune.structure.spaces import Structure, gate_shapes

__all__ = ["unit_magnitudes"]


def unit_magnitudes(structure: Structure, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Euclidean norm of the weights and biases that go with each unit.

    Args:
        structure: from `analyze`.
        read: whole value of a parameter by name; called once for each, in order.

    Returns:
        By kind of gate, as `gate_shapes`, fp64 on the CPU; a head has those of its dimensions. The
        coarse kinds `attn` and `ffn` have those of their units.
    """
    squares = {kind: torch.zeros(shape, dtype=torch.float64) for kind, shape in gate_shapes(structure.sizes).items()}
    for param in structure.params.values():
        value = read(param.name).detach().double().cpu().square()
        for axis, space in enumerate(param.axes):
            if space is None:
                continue
            others = [i for i in range(value.dim()) if i != axis]
            place = squares[space.kind] if space.layer is None else squares[space.kind][space.layer]
            place += value.sum(others) if others else value
    dims = squares["qk_dim"] + squares["vo_dim"]
    squares["head"] = by_head(dims, structure.sizes.num_heads).sum(-1)
    squares["attn"], squares["ffn"] = dims.sum(-1), squares["ffn_dim"].sum(-1)
    return {kind: square.sqrt() for kind, square in squares.items()}
