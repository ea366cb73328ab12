"""How large the weights are that read a unit: scores without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dsprune.structure import Structure, gate_shapes

__all__ = ["Norm", "output_scores"]

Norm = Literal["sum", "l1", "linf"]


def output_scores(structure: Structure, read: Callable[[str], Tensor], norm: Norm) -> dict[str, Tensor]:
    """Size of the output weights of every head (or group of heads) and neuron.

    GRAIN's code (`ISPruner.gather_IS`): of the columns of the attention's and of the FFN's output matrix that read a
    unit the absolute value of the sum (`magnitude-sumabs`), the sum of absolute values (`magnitude-L1`) or the largest
    one (`magnitude-Linf`). Biases take no part.

    Args:
        structure: from `analyze`.
        read: whole value of a parameter by name; called once for each output matrix, in order.
        norm: how a unit's columns become one number.

    Returns:
        `head` and `ffn_dim`, as `gate_shapes`, fp32 on the CPU.
    """
    shapes = gate_shapes(structure.sizes)
    scores = {kind: torch.zeros(shapes[kind]) for kind in ("head", "ffn_dim")}
    for sublayer in structure.sublayers:
        weight = read(f"{sublayer.output}.weight").detach().double().cpu()
        weight = weight.t() if structure.is_transposed(sublayer.output) else weight
        kind = "head" if sublayer.kind == "attn" else "ffn_dim"
        columns = weight.reshape(len(weight), shapes[kind][1], -1)
        scores[kind][sublayer.index] = _reduce(columns, norm).float()
    return scores


def _reduce(columns: Tensor, norm: Norm) -> Tensor:
    """One number a unit, [units], from its columns: [rows, units, columns of a unit]."""
    if norm == "sum":
        return columns.sum((0, 2)).abs()
    return columns.abs().sum((0, 2)) if norm == "l1" else columns.abs().amax((0, 2))
