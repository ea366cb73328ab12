"""What a set of gates costs: parameters and multiply-adds, exact for hard gates, differentiable for soft ones.

Every parameter tensor costs the product of its axes' live widths, times the chance that its sublayer
exists. With gates in {0, 1} this is an integer: the parameter count of the exported model. With
probabilities it is the expected count under independent gates, the quantity that CoFi constrains
(arXiv 2204.00408, equation 3; their code leaves norms, some biases and the "all units gone" case
out, here all are counted).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsprune.structure.expected import expected_alive, expected_rows, expected_units
from dsprune.structure.gating import Gates, complete
from dsprune.structure.spaces import Empty, ParamSpec, Space, Structure

__all__ = ["CostModel", "Scope"]

Scope = Literal["encoder", "total"]


@dataclass(frozen=True)
class _Term:
    """Sum of all parameters of one form: `weight * alive(sublayer) * units * rows * hidden ** num_hidden *
    pooler ** num_pooler`.

    `sublayer` is the kind of sublayer that the parameters belong to, and `units` that of the units, one for each
    such sublayer; None where they only belong to the sublayer, or to none. `rows`: whether they belong to its output
    rows. `inner`: whether they are gone with the last unit, even where the sublayer keeps its output bias. `users`:
    places of the attentions that share them, which are there while one of those is.
    """

    sublayer: str | None
    units: str | None
    rows: bool
    inner: bool
    num_hidden: int
    num_pooler: int
    users: tuple[int, ...] = ()

    @classmethod
    def of(cls, param: ParamSpec, spaces: tuple[Space, ...]) -> _Term:
        kinds = [space.kind for space in spaces]
        units = next((kind for kind in kinds if kind in ("qk_dim", "vo_dim", "ffn_dim")), None)
        rows = any(kind in ("attn_row", "ffn_row") for kind in kinds)
        sublayer = param.sublayer.kind if param.sublayer else None
        users = tuple(user.index for user in param.users)
        return cls(sublayer, units, rows, param.inner, kinds.count("hidden"), kinds.count("pooler"), users)


class CostModel:
    """Counts of one model under any gates. All results are float64, exact up to 2**53.

    Args:
        structure: from `analyze`.
        empty: what a removed sublayer leaves behind, which the count must follow.
    """

    def __init__(self, structure: Structure, *, empty: Empty = "identity") -> None:
        self.structure = structure
        self.empty = empty
        self._parameters = {
            "encoder": self._terms(lambda p: p.numel if p.part == "encoder" else 0),
            "total": self._terms(lambda p: p.numel),
        }
        self._token_macs = self._terms(lambda p: p.numel if _is_matmul(p) and not p.per_sequence else 0)
        self._sequence_macs = self._terms(lambda p: p.numel * _rows_beside_tokens(p) if _is_matmul(p) else 0)

    def _terms(self, count: Callable[[ParamSpec], int]) -> Mapping[_Term, Tensor]:
        """Counts per form and sublayer; each form's count is divided by the dense widths it is multiplied by."""
        sizes = self.structure.sizes
        places = {"attn": sizes.num_attn, "ffn": sizes.num_ffn, None: 1}
        terms: dict[_Term, Tensor] = {}
        for param in self.structure.params.values():
            share = count(param) / param.numel
            for numel, spaces in param.tiles():
                width = math.prod(space.size for space in spaces)
                term, index = _Term.of(param, spaces), param.sublayer.index if param.sublayer else 0
                weights = terms.setdefault(term, torch.zeros(places[term.sublayer], dtype=torch.float64))
                weights[index] += share * numel / width
        return {term: weights for term, weights in terms.items() if weights.any()}

    def _sum(self, terms: Mapping[_Term, Tensor], gates: Gates) -> Tensor:
        full = {kind: gate.double() for kind, gate in complete(self.structure, gates).items()}
        hidden, units, alive = full["hidden"].sum(), expected_units(full), expected_alive(full)
        rows = expected_rows(full)
        total = hidden.new_zeros(())
        for term, weights in terms.items():
            count = weights.to(hidden.device) * hidden**term.num_hidden
            if term.num_pooler:
                count = count * full["pooler"].sum() ** term.num_pooler
            if term.units is not None:
                count = count * units[term.units]
            elif term.sublayer is not None and (self.empty == "identity" or term.inner):
                count = count * alive[term.sublayer]
            elif term.rows and term.sublayer is not None:
                count = count * full[term.sublayer]
            if term.rows and term.sublayer is not None:
                count = count * rows[term.sublayer].sum(-1)
            if term.users:
                count = count * (1 - (1 - alive["attn"][list(term.users)]).prod())
            total = total + count.sum()
        return total

    def parameters(self, gates: Gates, *, of: Scope = "encoder") -> Tensor:
        """Parameters left: [] float64. `gates` are 0/1, or the probabilities that units are kept.

        "encoder" is everything inside the layers, norms and biases included; "total" adds
        embeddings, pooler and task head.
        """
        return self._sum(self._parameters[of], gates)

    def sparsity(self, gates: Gates, *, of: Scope = "encoder") -> Tensor:
        """Share of the parameters that is gone: [] float64."""
        return 1 - self.parameters(gates, of=of) / self.dense(of)

    def dense(self, of: Scope = "encoder") -> int:
        """Parameters of the dense model; of the one before its embedding was factored, if it was."""
        count = sum(p.numel for p in self.structure.params.values() if of == "total" or p.part == "encoder")
        return count + (self.structure.factored_away if of == "total" else 0)

    def macs(self, gates: Gates, *, length: int) -> Tensor:
        """Multiply-adds of one sequence of `length` tokens: linears, attention scores and their sums; [] float64.

        An encoder-decoder reads so many tokens, and writes as many.
        """
        full = {kind: gate.double() for kind, gate in complete(self.structure, gates).items()}
        units, sizes, positions = expected_units(full), self.structure.sizes, self.structure.positions
        table = 0 if positions is None else positions.products * positions.rows
        products = units["qk_dim"] * sizes.pair * (length + table) + units["vo_dim"] * length
        attention = length * sizes.heads_per_group * products.sum()
        return length * self._sum(self._token_macs, full) + self._sum(self._sequence_macs, full) + attention


def _is_matmul(param: ParamSpec) -> bool:
    return len(param.shape) == 2 and not param.lookup


def _rows_beside_tokens(param: ParamSpec) -> int:
    """What a linear multiplies once for a sequence, whatever its length: positions, or one summary of the tokens."""
    return param.positions or int(param.per_sequence)
