"""Gates on a live model: hooks that let a handful of small tensors remove any unit.

Nothing of the model is copied or rewritten: the linears that end each sublayer and the norms get a
forward that reads the gates, and give their own back when the gates are taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsprune.errors import ArchitectureError, ConfigError
from dsprune.structure.kernels import gated_linear, live_layer_norm
from dsprune.structure.spaces import Empty, Structure, gate_shapes

__all__ = [
    "Gates",
    "Gating",
    "attach_gates",
    "by_head",
    "complete",
    "ffn_alive",
    "head_alive",
    "ones",
    "sublayer_alive",
    "unit_gates",
]

Gates = Mapping[str, Tensor]
"""Gate tensors by kind; a kind that is absent is all ones. Shapes: see `gate_shapes`."""


def ones(structure: Structure, kinds: tuple[str, ...] | None = None, **options: Any) -> dict[str, Tensor]:
    """Gates that keep everything; `options` go to `torch.ones`."""
    shapes = gate_shapes(structure.sizes)
    return {kind: torch.ones(shapes[kind], **options) for kind in kinds or shapes}


def complete(structure: Structure, gates: Gates) -> dict[str, Tensor]:
    """All kinds of gates: the given ones, and ones for the kinds that are not given.

    Raises:
        ConfigError: unknown kind or wrong shape.
    """
    shapes = gate_shapes(structure.sizes)
    for kind, gate in gates.items():
        if kind not in shapes:
            raise ConfigError(f"unknown gate '{kind}': known are {', '.join(shapes)}")
        if tuple(gate.shape) != shapes[kind]:
            raise ConfigError(f"gate '{kind}' has shape {list(gate.shape)}: this model needs {list(shapes[kind])}")
    like = next(iter(gates.values()), torch.ones(()))
    return {
        kind: gates[kind] if kind in gates else torch.ones(shape, dtype=like.dtype, device=like.device)
        for kind, shape in shapes.items()
    }


def by_head(dims: Tensor, num_heads: int) -> Tensor:
    """Dimensions of all heads apart by head: [L, H * D] as [L, H, D]."""
    return dims.reshape(*dims.shape[:-1], num_heads, -1)


def row_gates(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What multiplies each output row of a sublayer, coarser gates over it included: [L, d] for `attn` and `ffn`."""
    return {kind: gates[kind][:, None] * gates[f"{kind}_row"] * gates["hidden"] for kind in ("attn", "ffn")}


def head_alive(gates: Mapping[str, Tensor]) -> Tensor:
    """Which heads give out anything: gate on and at least one value dimension on. Bool [L, H]."""
    head = gates["head"]
    return (head != 0) & (by_head(gates["vo_dim"], head.shape[-1]) != 0).any(-1)


def ffn_alive(gates: Mapping[str, Tensor]) -> Tensor:
    """Which FFN sublayers exist: coarse gate on and at least one neuron on. Bool [L]."""
    return (gates["ffn"] != 0) & (gates["ffn_dim"] != 0).any(-1)


def sublayer_alive(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which sublayers exist: at least one unit on, and at least one row to write. Bool [L] for `attn` and `ffn`."""
    writes = {kind: (rows != 0).any(-1) for kind, rows in row_gates(gates).items()}
    return {"attn": writes["attn"] & head_alive(gates).any(-1), "ffn": writes["ffn"] & ffn_alive(gates)}


def unit_gates(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What multiplies each unit, coarser gates over it included; by the kind of its space, [L, units] each.

    Units that can have no effect are 0: those of a sublayer without rows to write, and the query
    dimensions of a head that gives out nothing.
    """
    dims = gates["vo_dim"].shape[-1] // gates["head"].shape[-1]
    rows = row_gates(gates)
    writes = {kind: (rows[kind] != 0).any(-1, keepdim=True) for kind in rows}
    return {
        "qk_dim": gates["qk_dim"] * (head_alive(gates).repeat_interleave(dims, -1) & writes["attn"]),
        "vo_dim": gates["vo_dim"] * gates["head"].repeat_interleave(dims, -1) * writes["attn"],
        "ffn_dim": gates["ffn_dim"] * writes["ffn"],
        "attn_row": rows["attn"],
        "ffn_row": rows["ffn"],
    }


@dataclass
class _LinearSite:
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class _NormSite:
    gate: Tensor | None = None
    alive: Tensor | None = None


def _linear_forward(
    gating: Gating, module: nn.Linear, site: _LinearSite, dense: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    if site.rows is None or site.columns is None:
        return dense(x)
    return gated_linear(x, module.weight, module.bias, site.rows, site.columns, frozen=gating.frozen)


def _norm_forward(
    module: nn.LayerNorm, site: _NormSite, gate_input: bool, dense: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    if site.gate is None or site.alive is None:
        return dense(x)
    if gate_input:
        x = x * site.gate.to(x.dtype)
    return live_layer_norm(x, module.weight, module.bias, site.gate, site.alive, module.eps)


class Gating:
    """Gates attached to one model; made by `attach_gates`.

    `set` must be called before each forward pass whose gradient is wanted, since what is derived
    from the gates belongs to the graph of one pass.
    """

    def __init__(self, model: nn.Module, structure: Structure, empty: Empty = "identity") -> None:
        self.structure = structure
        self.empty = empty
        self.frozen = False
        """Whether gated weights get no gradients: for passes that want those of the gates alone."""
        self._linears: dict[str, _LinearSite] = {}
        self._norms: dict[str, _NormSite] = {}
        self._patched: list[nn.Module] = []
        for sublayer in structure.sublayers:
            self._add_linear(model, sublayer.output)
            if sublayer.query is not None:
                self._add_linear(model, sublayer.query)
            self._add_norm(model, sublayer.norm, gate_input=False)
        if structure.embedding_norm is not None:
            self._add_norm(model, structure.embedding_norm, gate_input=True)
        self._projection = self._find_projection(model)

    def _find_projection(self, model: nn.Module) -> str | None:
        path = self.structure.family.embedding_projection
        if path is None or self.structure.embedding_norm is not None:
            return None
        path = f"{self.structure.base}.{path}" if self.structure.base else path
        self._add_linear(model, path)
        return path

    def _add_linear(self, model: nn.Module, path: str) -> None:
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise ArchitectureError(f"{path} is a {type(module).__name__}, and gates need a Linear there")
        site = self._linears[path] = _LinearSite()
        self._patch(module, partial(_linear_forward, self, module, site, module.forward))

    def _add_norm(self, model: nn.Module, path: str, *, gate_input: bool) -> None:
        module = model.get_submodule(path)
        if not isinstance(module, nn.LayerNorm):
            raise ArchitectureError(f"{path} is a {type(module).__name__}, and gates need a LayerNorm there")
        site = self._norms[path] = _NormSite()
        self._patch(module, partial(_norm_forward, module, site, gate_input, module.forward))

    def _patch(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        module.forward = forward
        self._patched.append(module)

    def set(self, gates: Gates | None) -> None:
        """Let the next forward passes use these gates; None is the dense model, untouched.

        Args:
            gates: by kind, on the model's device, fp32 (fp64 with an fp64 model).

        Raises:
            ConfigError: unknown kind or wrong shape.
        """
        for linear in self._linears.values():
            linear.rows = linear.columns = None
        for norm in self._norms.values():
            norm.gate = norm.alive = None
        if gates is None:
            return
        full = complete(self.structure, gates)
        units, alive, hidden = unit_gates(full), sublayer_alive(full), full["hidden"]
        always = torch.ones((), dtype=torch.bool, device=hidden.device)
        # Norms see the hidden gates, and whether their sublayer is there at all; without either they are left alone.
        gate_norms = self.empty == "identity" or "hidden" in gates
        for sublayer in self.structure.sublayers:
            lives = alive[sublayer.kind][sublayer.layer] if self.empty == "identity" else always
            linear = self._linears[sublayer.output]
            linear.rows = units[sublayer.rows.kind][sublayer.layer] * lives
            linear.columns = units[sublayer.units.kind][sublayer.layer]
            if sublayer.query is not None and "qk_dim" in gates:
                linear = self._linears[sublayer.query]
                linear.rows, linear.columns = full["qk_dim"][sublayer.layer], torch.ones_like(hidden)
            if gate_norms:
                norm = self._norms[sublayer.norm]
                norm.gate, norm.alive = hidden, lives
        if self.structure.embedding_norm is not None and "hidden" in gates:
            site = self._norms[self.structure.embedding_norm]
            site.gate, site.alive = hidden, always
        if self._projection is not None and "hidden" in gates:
            linear = self._linears[self._projection]
            linear.rows, linear.columns = hidden, torch.ones_like(hidden[:1]).expand(self._projection_width())

    def _projection_width(self) -> int:
        return self.structure.params[f"{self._projection}.weight"].shape[1]

    def remove(self) -> None:
        """Take the gates off: the model's modules get their own forward back."""
        for module in self._patched:
            del module.forward
        self._patched.clear()


def attach_gates(model: nn.Module, structure: Structure, *, empty: Empty = "identity") -> Gating:
    """Put gates on a live model (all open until `Gating.set`).

    Args:
        model: the model that `structure` was made from; under ZeRO, attach before the engine is built.
        structure: from `analyze`.
        empty: what a sublayer without units computes.

    Raises:
        ArchitectureError: a gated module is not of a kind that gates know.
    """
    return Gating(model, structure, empty)
