"""Gates of every awkward shape, for the property tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsprune.structure import Structure, gate_shapes


def random_gates(structure: Structure, seed: int, *, soft: bool = False) -> dict[str, Tensor]:
    """Random gates; soft ones are 0 or anything up to 1."""
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for kind, shape in gate_shapes(structure.sizes).items():
        gate = (torch.rand(shape, generator=generator) > 0.35).float()
        if soft:
            gate = gate * (0.3 + 0.7 * torch.rand(shape, generator=generator))
        gates[kind] = gate
    if seed % 2:  # ragged heads everywhere would leave their equals untested
        gates["qk_dim"], gates["vo_dim"] = torch.ones_like(gates["qk_dim"]), torch.ones_like(gates["vo_dim"])
    if not gates["hidden"].any():
        gates["hidden"][0] = 1.0
    return _without_refused(structure, gates)


def _without_refused(structure: Structure, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gates that the family cannot close are open."""
    return gates | {kind: torch.ones_like(gates[kind]) for kind in structure.family.refused}


def awkward_gates(structure: Structure) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Named cases: empty sublayers of every origin, a single head, one dimension left, everything gone."""
    sizes = structure.sizes
    dims = sizes.head_dim
    queries = dims // sizes.pair
    everything = slice(None)
    closed: dict[str, list[tuple[str, Any]]] = {
        "all kept": [],
        "coarse gates off": [("attn", 0), ("ffn", 1)],
        "all fine units off, coarse gates on": [("head", 0), ("ffn_dim", 1)],
        "a single head a layer": [("head", (everything, slice(1, None)))],
        "a single neuron a layer": [("ffn_dim", (everything, slice(1, None)))],
        "one hidden dimension left": [("hidden", slice(1, None))],
        "a whole layer gone": [("attn", 0), ("ffn_dim", 0)],
        "everything gone": [("attn", everything), ("ffn", everything)],
        "one dimension left in one head": [(kind, (everything, slice(1, None))) for kind in ("qk_dim", "vo_dim")],
        "a head without queries": [("qk_dim", (everything, slice(queries)))],
        "a layer without queries": [("qk_dim", 0), ("vo_dim", (0, slice(dims, 2 * dims)))],
        "heads without values": [("vo_dim", (everything, slice(sizes.num_groups // 2 * dims)))],
        "all heads smaller by one": [
            ("qk_dim", (everything, slice(1, None, queries))),
            ("vo_dim", (everything, slice(1, None, dims))),
        ],
        "some rows only": [("attn_row", (everything, slice(3, None, 2))), ("ffn_row", (everything, slice(4)))],
        "one row of one head": [("attn_row", (0, slice(1, None))), ("head", (0, slice(1, None)))],
        "no rows": [("attn_row", 0), ("ffn_row", 1)],
        "rows of an empty sublayer": [("vo_dim", 0), ("attn_row", (0, slice(20))), ("hidden", slice(5, 25))],
        "an empty layer": [("vo_dim", 0), ("ffn_dim", 0)],
        "only the last attention left": [("attn", slice(-1))],
        "the last attention gone, the first of one head": [("attn", -1), ("head", (0, slice(1)))],
        "a layer's head and another's": [("head", (0, 0)), ("head", (slice(1, None), sizes.num_groups - 1))],
    }
    for name, closings in closed.items():
        gates = {kind: torch.ones(shape) for kind, shape in gate_shapes(structure.sizes).items()}
        for kind, where in closings:
            gates[kind][where] = 0
        yield name, _without_refused(structure, gates)
