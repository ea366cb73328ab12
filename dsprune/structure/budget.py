"""What a method is held to: a cost of the model, and the share of it that is to go.

A method asks a budget what its gates cost and what a unit is worth, and never which cost that is: parameters,
multiply-adds, or anything else that is a differentiable function of gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsprune.errors import ConfigError
from dsprune.structure.blocks.block_spaces import BlockStructure
from dsprune.structure.cost import CostModel
from dsprune.structure.gating import Gates
from dsprune.structure.spaces import Empty, Structure, gate_shapes

__all__ = ["Budget", "Counted", "block_budget", "budget_for"]

Counted = Literal["encoder", "total", "macs"]
"""Costs that a target can be a share of, by the names that recipes have for them."""
SHARED = ("hidden", "pooler")
"""Kinds whose units the whole model shares: all are alike, and one of them has to stay."""


@dataclass(frozen=True)
class Budget:
    """A cost of one model, and how much of it is to go.

    Attributes:
        target: share of `dense` to remove, from 0 to 1.
        cost: of what gates leave: [] float64. Differentiable in the probabilities that units are kept, exact for 0 and
            1; a kind of gates that is not given is all open.
        dense: cost of the model before anything was taken from it.
        words: what is counted, such as "the encoder's parameters".
        shapes: of the gates, by kind.
        setting: what the user set the target by.
        price: instead of the gradient of `cost`, what goes with one unit of a kind, as its gates, float64.
    """

    target: float
    cost: Callable[[Gates], Tensor]
    dense: float
    words: str
    shapes: Mapping[str, tuple[int, ...]]
    setting: str = "prune.target"
    price: Callable[[str], Tensor] | None = None

    @property
    def share(self) -> float:
        """Share of the dense cost that may be left."""
        return 1 - self.target

    def describe(self) -> str:
        """What is counted, in words: cards, reports, logs and errors have no others."""
        return self.words

    @property
    def asked(self) -> str:
        """What the user asked for, as it was set: the beginning of every refusal."""
        return f"{self.setting} = {self.target:g} of {self.words}"

    @property
    def goal(self) -> str:
        """What is to be reached, for titles."""
        return f"{self.target:.0%} of {self.words}"

    def reach(self, share: float) -> str:
        """A share that can be removed at most, in the words of a refusal."""
        return f"{share:.4f}"

    def spent(self, gates: Gates) -> Tensor:
        """Cost that gates leave: [] float64, in the unit of `dense`. Gates are 0/1, or probabilities of being kept."""
        return self.cost(gates)

    def sparsity(self, gates: Gates) -> Tensor:
        """Share of the dense cost that is gone: [] float64."""
        return 1 - self.spent(gates) / self.dense

    @torch.no_grad()
    def removed(self, gates: Gates) -> float:
        """Share that gates remove when they are final: 0 removes a unit, any other value keeps it whole."""
        return float(self.sparsity({kind: (gate != 0).double() for kind, gate in gates.items()}))

    def excess(self, sparsity: float) -> float:
        """Cost that gates have to remove for a sparsity; less than its share where some went before there were any."""
        return float(self.spent({})) - (self.dense - sparsity * self.dense)

    def prices(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        """Cost that goes with one unit, all else kept: by kind, as its gates, float64.

        This is the gradient of the cost at open gates, which is linear in any one of them; of units that the whole
        model shares, powers of whose number it holds, the difference that one of them makes.
        """
        return {kind: self._price(kind) for kind in kinds}

    def _price(self, kind: str) -> Tensor:
        if self.price is not None:
            return self.price(kind)
        gate = torch.ones(self.shapes[kind], dtype=torch.float64)
        if kind in SHARED:
            one_less = gate.clone()
            one_less[0] = 0
            return (self.spent({}) - self.spent({kind: one_less})).expand_as(gate).clone()
        with torch.enable_grad():
            gate.requires_grad_()
            (price,) = torch.autograd.grad(self.spent({kind: gate}), gate, materialize_grads=True)
        return price.contiguous()  # one row may have stood for many

    def floor(self, kinds: tuple[str, ...]) -> float:
        """Least cost that gates of these kinds can leave: all are closed, but for one unit that the model needs."""
        gates = {kind: torch.zeros(self.shapes[kind], dtype=torch.float64) for kind in kinds}
        for kind in gates.keys() & set(SHARED):
            gates[kind][0] = 1
        return float(self.spent(gates))

    def check(self, floor: float, why: str) -> None:
        """Refuse a target that a method cannot reach.

        Args:
            floor: least cost that its gates can leave.
            why: what keeps it there, with `{}` for the share that is reachable.

        Raises:
            ConfigError: naming what is reachable.
        """
        reachable = 1 - floor / self.dense
        if self.target > reachable:
            raise ConfigError(f"{self.asked} is out of reach: {why.format(self.reach(reachable))}")


def budget_for(
    structure: Structure,
    target: float,
    *,
    of: Counted = "encoder",
    empty: Empty = "identity",
    length: int = 128,
    setting: str = "prune.target",
) -> Budget:
    """A budget of one of the costs that a count gives.

    Args:
        structure: of the dense model.
        target: share to remove.
        of: `encoder`, the parameters of the layers; `total`, all parameters; `macs`, the multiply-adds of a sequence.
        empty: what a sublayer without units computes.
        length: with `macs`, tokens of the sequence; an encoder-decoder reads so many and writes as many.
        setting: what the user set the target by.
    """
    model = CostModel(structure, empty=empty)
    shapes = gate_shapes(structure.sizes)
    if of == "macs":
        dense = float(model.macs({}, length=length)) - length * structure.factoring_macs
        words = f"the multiply-adds at length {length}"
        return Budget(target, lambda gates: model.macs(gates, length=length), dense, words, shapes, setting)
    words = "the encoder's parameters" if of == "encoder" else "all parameters"
    return Budget(target, lambda gates: model.parameters(gates, of=of), model.dense(of), words, shapes, setting)


def block_budget(structure: BlockStructure, target: float) -> Budget:
    """A budget of what a choice of blocks stores of a compact model's encoder; gates are by matrix, of any shape.

    A block's price is what it stores, although a matrix that loses none is stored without the padding of its edges.
    """
    blocks = {matrix.path: matrix for matrix in structure.matrices}

    def price(path: str) -> Tensor:
        rows, columns = blocks[path].block
        return torch.full(blocks[path].grid, float(rows * columns), dtype=torch.float64)

    return Budget(
        target,
        structure.remaining,
        structure.parameters["encoder"],
        "the compact model's encoder",
        structure.gate_shapes,
        "blocks.target",
        price,
    )
