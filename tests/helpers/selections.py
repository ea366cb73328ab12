"""Gates of every awkward shape, for the property tests."""

from __future__ import annotations

from collections.abc import Iterator

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
    return gates


def awkward_gates(structure: Structure) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Named cases: empty sublayers of every origin, a single head, one hidden dimension left, everything gone."""
    shapes = gate_shapes(structure.sizes)

    def ones() -> dict[str, Tensor]:
        return {kind: torch.ones(shape) for kind, shape in shapes.items()}

    gates = ones()
    yield "all kept", gates
    gates = ones()
    gates["attn"][0] = 0
    gates["ffn"][1] = 0
    yield "coarse gates off", gates
    gates = ones()
    gates["head"][0] = 0
    gates["ffn_dim"][1] = 0
    yield "all fine units off, coarse gates on", gates
    gates = ones()
    gates["head"][:, 1:] = 0
    yield "a single head a layer", gates
    gates = ones()
    gates["ffn_dim"][:, 1:] = 0
    yield "a single neuron a layer", gates
    gates = ones()
    gates["hidden"][1:] = 0
    yield "one hidden dimension left", gates
    gates = ones()
    gates["attn"][0] = 0
    gates["ffn_dim"][0] = 0
    yield "a whole layer gone", gates
    gates = ones()
    gates["attn"][:] = 0
    gates["ffn"][:] = 0
    yield "everything gone", gates
    dims = structure.sizes.head_dim
    gates = ones()
    gates["qk_dim"][:, 1:] = 0
    gates["vo_dim"][:, 1:] = 0
    yield "one dimension left in one head", gates
    gates = ones()
    gates["qk_dim"][:, :dims] = 0
    yield "a head without queries", gates
    gates = ones()
    gates["qk_dim"][0] = 0
    gates["vo_dim"][0, dims : 2 * dims] = 0
    yield "a layer without queries", gates
    gates = ones()
    gates["vo_dim"][:, : 2 * dims] = 0
    yield "heads without values", gates
    gates = ones()
    gates["vo_dim"][:, 1::dims] = 0
    gates["qk_dim"][:, 1::dims] = 0
    yield "all heads smaller by one", gates
    gates = ones()
    gates["vo_dim"][0] = 0
    gates["ffn_dim"][0] = 0
    yield "an empty layer", gates
