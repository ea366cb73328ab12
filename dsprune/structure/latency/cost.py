"""What a set of gates costs in milliseconds, read from a measured table.

A forward pass is the sum of its parts: what stays, at the width of the residual stream, and each sublayer at its
own sizes and that width. Between measured sizes the lines are straight, at them the table is exact, and no gate that
closes makes the sum larger.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dsprune.structure.expected import expected_alive, expected_heads, expected_rows, expected_writes
from dsprune.structure.gating import Gates, by_head, complete
from dsprune.structure.latency.curves import Matrix, monotone, piecewise
from dsprune.structure.latency.identity import parts_of
from dsprune.structure.latency.sublayers import AttentionSizes, AttentionTime, SublayerTime
from dsprune.structure.latency.table import LatencyTable
from dsprune.structure.spaces import Empty, Structure, Sublayer, gate_shapes

__all__ = ["LatencyCost"]

PRICED_FROM, PRICE_STEPS = 0.25, 12
"""Share of the units from which on a price looks at the slope, and at how many places up to all of them."""


class LatencyCost:
    """Milliseconds of one model under any gates; float64.

    Whatever is cut runs in the compact classes, and so it is counted; the dense model runs in its own, and may take
    longer or shorter than all its parts would as compact ones.

    Attributes:
        dense: time of the dense model.

    Args:
        structure: from `analyze`.
        table: of this model.
        empty: what a removed sublayer leaves behind: nothing, which takes no time, or its bias and its norm.

    Raises:
        ConfigError: the table is of a model of other sizes.
    """

    def __init__(self, structure: Structure, table: LatencyTable, *, empty: Empty = "identity") -> None:
        table.check_model(structure, "given")
        self.structure, self.table, self.empty = structure, table, empty
        self.shapes = gate_shapes(structure.sizes)
        self._stays = monotone(_clipped(table.stays))
        self._idle = monotone(_clipped(table.idle))
        self._parts: list[tuple[SublayerTime, list[Sublayer]]] = [
            (
                AttentionTime(table.parts[name], table.hidden, structure.sizes.head_dim)
                if sublayers[0].kind == "attn"
                else SublayerTime(table.parts[name], table.hidden),
                sublayers,
            )
            for name, sublayers in parts_of(structure).items()
        ]
        self._written = {sublayer.output: _written_share(structure, sublayer) for sublayer in structure.sublayers}
        self.dense = table.whole

    def milliseconds(self, gates: Gates) -> Tensor:
        """Time of a forward pass of the table's batch: [] float64, differentiable.

        Args:
            gates: 0/1, or the probabilities that units are kept; a kind that is not given is all open.
        """
        full = {kind: gate.double() for kind, gate in complete(self.structure, gates).items()}
        width = full["hidden"].sum()
        writes, alive, rows = expected_writes(full), expected_alive(full), expected_rows(full)
        total = piecewise(self.table.hidden, self._stays, width)
        for time, sublayers in self._parts:
            kind, index = sublayers[0].kind, [sublayer.index for sublayer in sublayers]
            share = torch.tensor([self._written[sublayer.output] for sublayer in sublayers], dtype=torch.float64)
            # Of a sublayer's matrices one writes the rows that are left, the others read the whole width.
            widths = width * (1 - share.to(width.device)) + rows[kind][index].sum(-1) * share.to(width.device)
            here, there = writes[kind][index], alive[kind][index]
            given = there / here.clamp(min=torch.finfo(here.dtype).tiny)
            if isinstance(time, AttentionTime):
                spent = time.of_heads(_attention_sizes(full, index, self.structure.sizes.pair), given, widths)
            else:
                spent = time.of_units(full["ffn_dim"][index].sum(-1), given, widths)
            total = total + (here * spent).sum()
            if self.empty == "bias":
                total = total + ((1 - there) * piecewise(self.table.hidden, self._idle, width)).sum()
        return total

    def price(self, kind: str) -> Tensor:
        """Milliseconds that a unit of a kind is worth, all other kinds kept: of the shape of its gates, float64.

        The mean slope on the way from a quarter of the kind's units to all of them, as Aumann and Shapley price
        (Values of Non-Atomic Games, 1974): at the dense model itself the slope may be that of a plateau, and what
        the last units save besides belongs to their sublayer.
        """
        shape = self.shapes[kind]
        price = torch.zeros(shape, dtype=torch.float64)
        for step in range(PRICE_STEPS):
            share = PRICED_FROM + (1 - PRICED_FROM) * (step + 0.5) / PRICE_STEPS
            gate = torch.full(shape, share, dtype=torch.float64, requires_grad=True)
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(self.milliseconds({kind: gate}), gate, materialize_grads=True)
            price += slope / PRICE_STEPS
        return price


def _clipped(times: tuple[float, ...]) -> Matrix:
    return np.asarray(times, dtype=np.float64).clip(min=0)


def _written_share(structure: Structure, sublayer: Sublayer) -> float:
    """Share of a sublayer's matrices that the one which writes the residual stream has."""
    matrices = {
        p.name: p.numel
        for p in structure.params.values()
        if p.sublayer == sublayer and len(p.shape) == 2 and not p.lookup
    }
    return matrices[f"{sublayer.output}.weight"] / sum(matrices.values())


def _attention_sizes(full: Mapping[str, Tensor], index: list[int], pair: int) -> AttentionSizes:
    """Expected sizes of attentions that exist; [A] each.

    A head that may be there at all counts in full for the size that all heads are padded to. Under rotary positions
    that size has a place for each pair that any head keeps.
    """
    alive = expected_heads(full)[index]
    queries, values = (by_head(full[kind][index], alive.shape[-1]) for kind in ("qk_dim", "vo_dim"))
    possible = (alive > 0).double()[..., None]
    if pair == 1:
        query_width = (possible * queries).sum(-1).amax(-1)
    else:
        query_width = pair * (1 - (1 - possible * queries).prod(-2)).sum(-1)
    return AttentionSizes(
        heads=alive.sum(-1),
        queries=pair * (alive * queries.sum(-1)).sum(-1),
        values=(full["head"][index] * values.sum(-1)).sum(-1),
        widest=torch.maximum(query_width, (possible * values).sum(-1).amax(-1)),
    )
