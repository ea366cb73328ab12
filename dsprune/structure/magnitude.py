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
        for i, axis in enumerate(param.axes):
            others = [other for other in range(value.dim()) if other != i]
            entries = value.sum(others) if others else value
            parts = torch.split(entries, [segment.extent for segment in axis])  # type: ignore[no-untyped-call]
            for segment, part in zip(axis, parts, strict=True):
                if segment.space is not None:
                    place = squares[segment.space.kind]
                    place = place if segment.space.index is None else place[segment.space.index]
                    place += segment.gather(part)
    groups = structure.sizes.num_groups
    squares["head"] = by_head(squares["qk_dim"], groups).sum(-1) + by_head(squares["vo_dim"], groups).sum(-1)
    squares["attn"], squares["ffn"] = squares["head"].sum(-1), squares["ffn_dim"].sum(-1)
    return {kind: square.sqrt() for kind, square in squares.items()}
