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
from dsprune.structure.kernels import gated_linear, live_layer_norm, live_rms_norm
from dsprune.structure.spaces import Axis, Empty, Structure, Sublayer, gate_shapes

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
"""Gate tensors by kind; a kind that is absent is all ones. Shapes: see `gate_shapes`; L is the number of sublayers of
the kind at hand, which is that of layers unless there is cross attention."""


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
    """Units of all heads apart by head: [L, heads * units] as [L, heads, units].

    Where query heads share keys and values, a head here is such a group.
    """
    return dims.reshape(*dims.shape[:-1], num_heads, -1)


def row_gates(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What multiplies each output row of a sublayer, coarser gates over it included: [L, d] for `attn` and `ffn`."""
    return {kind: gates[kind][:, None] * gates[f"{kind}_row"] * gates["hidden"] for kind in ("attn", "ffn")}


def head_alive(gates: Mapping[str, Tensor]) -> Tensor:
    """Which heads (or groups) give out anything: gate on and at least one value dimension on. Bool [L, heads]."""
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
    rows = row_gates(gates)
    writes = {kind: (rows[kind] != 0).any(-1, keepdim=True) for kind in rows}
    queries, values = (gates[kind].shape[-1] // gates["head"].shape[-1] for kind in ("qk_dim", "vo_dim"))
    return {
        "qk_dim": gates["qk_dim"] * (head_alive(gates).repeat_interleave(queries, -1) & writes["attn"]),
        "vo_dim": gates["vo_dim"] * gates["head"].repeat_interleave(values, -1) * writes["attn"],
        "ffn_dim": gates["ffn_dim"] * writes["ffn"],
        "attn_row": rows["attn"],
        "ffn_row": rows["ffn"],
    }


@dataclass
class _LinearSite:
    transposed: bool = False
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class _NormSite:
    gate: Tensor | None = None
    alive: Tensor | None = None
    gate_input: bool = False
    gate_output: bool = False


@dataclass
class _TableSite:
    gate: Tensor | None = None


def _linear_forward(
    gating: Gating, module: Any, site: _LinearSite, dense: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    if site.rows is None or site.columns is None:
        return dense(x)
    return gated_linear(
        x, module.weight, module.bias, site.rows, site.columns, frozen=gating.frozen, transposed=site.transposed
    )


def _norm_forward(module: Any, site: _NormSite, dense: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if site.gate is None or site.alive is None:
        return dense(x)
    if site.gate_input:
        x = x * site.gate.to(x.dtype)
    if isinstance(module, nn.LayerNorm):
        y = live_layer_norm(x, module.weight, module.bias, site.gate, site.alive, module.eps)
    else:
        y = live_rms_norm(x, module.weight, site.gate, module.variance_epsilon)
    return y * site.gate.to(y.dtype) if site.gate_output else y


def _table_forward(site: _TableSite, dense: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    looked_up = dense(ids)
    return looked_up if site.gate is None else looked_up * site.gate.to(looked_up.dtype)


def _entry_gates(axis: Axis, gate: Tensor) -> Tensor:
    """Gates of an axis' entries: those of their units where the segment is gated, else 1."""
    parts = [
        segment.spread(gate) if segment.gated else torch.ones(segment.extent, dtype=gate.dtype, device=gate.device)
        for segment in axis
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _queries(sublayer: Sublayer) -> list[str]:
    """The linears whose rows the gates of query dimensions multiply; none in an FFN."""
    return [path for path in (sublayer.query, sublayer.position_query) if path is not None]


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
        self._tables: list[_TableSite] = []
        self._patched: list[nn.Module] = []
        for sublayer in structure.sublayers:
            self._add_linear(model, sublayer.output)
            for query in _queries(sublayer):
                self._add_linear(model, query)
            self._add_norm(model, sublayer.norm)
        if structure.embedding_norm is not None:
            self._add_norm(model, structure.embedding_norm, gate_input=True)
        for path in structure.final_norms:
            # A head that is the word embedding has the gates of that weight on what it reads, once more.
            read_by_head = path == structure.final_norms[-1]
            self._add_norm(model, path, gate_output=structure.tied and read_by_head)
        positions = structure.positions
        if positions is not None and positions.norm is not None:
            self._add_norm(model, positions.norm, gate_input=True)
        for path in (*structure.tables, *(positions.readers if positions is not None else ())):
            self._add_table(model, path)
        self._projection = self._find_projection(model)
        for path in structure.pooler_readers:
            self._add_linear(model, path)

    def _find_projection(self, model: nn.Module) -> str | None:
        """The linear that writes the residual stream from embeddings of another width, if there is one."""
        family = self.structure.family
        path = family.embedding_projection if self.structure.embedding_norm is None else None
        if self.structure.final_norms and self.structure.embedding_rank is not None:
            path = f"{family.word_embeddings}.projection"
        if path is None:
            return None
        path = f"{self.structure.base}.{path}" if self.structure.base else path
        self._add_linear(model, path)
        return path

    def _add_linear(self, model: nn.Module, path: str) -> None:
        module = model.get_submodule(path)
        transposed = self.structure.is_transposed(path)
        if not isinstance(module, nn.Linear) and not transposed:
            raise ArchitectureError(f"{path} is a {type(module).__name__}, and gates need a Linear there")
        site = self._linears[path] = _LinearSite(transposed)
        self._patch(module, partial(_linear_forward, self, module, site, module.forward))

    def _add_norm(self, model: nn.Module, path: str, *, gate_input: bool = False, gate_output: bool = False) -> None:
        module = model.get_submodule(path)
        if not isinstance(module, nn.LayerNorm) and not hasattr(module, "variance_epsilon"):
            raise ArchitectureError(
                f"{path} is a {type(module).__name__}, and gates need a LayerNorm or an RMSNorm there"
            )
        site = self._norms[path] = _NormSite(gate_input=gate_input, gate_output=gate_output)
        self._patch(module, partial(_norm_forward, module, site, module.forward))

    def _add_table(self, model: nn.Module, path: str) -> None:
        module = model.get_submodule(path)
        site = _TableSite()
        self._tables.append(site)
        self._patch(module, partial(_table_forward, site, module.forward))

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
        self._clear()
        if gates is None:
            return
        full = complete(self.structure, gates)
        alive, hidden = sublayer_alive(full), full["hidden"]
        always = torch.ones((), dtype=torch.bool, device=hidden.device)
        units = unit_gates(full)
        for sublayer in self.structure.sublayers:
            lives = alive[sublayer.kind][sublayer.index] if self.empty == "identity" else always
            self._set_linears(sublayer, full, units, lives, with_queries="qk_dim" in gates)
            # After the residual add a norm is skipped with its sublayer; before, nobody sees what it gives out.
            if self.structure.final_norms:
                lives = always
            # Norms see the hidden gates, and whether they are there at all; without either they are left alone.
            if "hidden" in gates or (self.empty == "identity" and lives is not always):
                norm = self._norms[sublayer.norm]
                norm.gate, norm.alive = hidden, lives
        if "hidden" in gates:
            self._set_stream(hidden, always)
        if "pooler" in gates:
            self._set_pooler(full["pooler"])

    def _clear(self) -> None:
        for linear in self._linears.values():
            linear.rows = linear.columns = None
        for norm in self._norms.values():
            norm.gate = norm.alive = None
        for table in self._tables:
            table.gate = None

    def _set_linears(self, sublayer: Sublayer, full: Gates, units: Gates, lives: Tensor, *, with_queries: bool) -> None:
        index = sublayer.index
        rows, columns = self.structure.linear_axes(sublayer.output)
        linear = self._linears[sublayer.output]
        linear.rows = _entry_gates(rows, units[sublayer.rows.kind][index] * lives)
        linear.columns = _entry_gates(columns, units[sublayer.units.kind][index])
        for query in _queries(sublayer) if with_queries else ():
            rows, _ = self.structure.linear_axes(query)
            linear = self._linears[query]
            linear.rows = _entry_gates(rows, full["qk_dim"][index])
            linear.columns = torch.ones_like(full["hidden"])

    def _set_stream(self, hidden: Tensor, always: Tensor) -> None:
        """Gate what writes the residual stream first, what reads it last, and the table that is read with it."""
        positions = self.structure.positions
        table_norm = None if positions is None else positions.norm
        for path in (self.structure.embedding_norm, *self.structure.final_norms, table_norm):
            if path is not None:
                self._norms[path].gate, self._norms[path].alive = hidden, always
        for table in self._tables:
            table.gate = hidden
        if self._projection is not None:
            linear = self._linears[self._projection]
            linear.rows, linear.columns = hidden, torch.ones_like(hidden[:1]).expand(self._projection_width())

    def _set_pooler(self, pooler: Tensor) -> None:
        """Gate what the classifier reads."""
        for path in self.structure.pooler_readers:
            rows, columns = self.structure.linear_axes(path)
            linear = self._linears[path]
            linear.rows, linear.columns = _entry_gates(rows, pooler), _entry_gates(columns, pooler)

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
