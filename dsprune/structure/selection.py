"""A Selection: the final choice of what is kept, and the scale of what is kept.

It is the narrow waist between methods, which make one, and surgery, cost and consolidation, which
only ever see one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsprune.errors import CheckpointError, ConfigError
from dsprune.structure.gating import Gates, by_head, complete, head_alive, sublayer_alive, unit_gates
from dsprune.structure.spaces import GATE_KINDS, Empty, Sizes, Space, Structure, Sublayer

__all__ = ["Selection"]


@dataclass(frozen=True)
class Selection:
    """Kept units and their scales for every space of a structure.

    Attributes:
        gates: every kind of gate, fp32 on the CPU; 0 removes a unit, anything else keeps it and is
            its scale, to be folded into the weights. They are not to change any more.
        empty: what a sublayer without units computes.
    """

    gates: Mapping[str, Tensor]
    empty: Empty = "identity"

    @classmethod
    def from_gates(cls, structure: Structure, gates: Gates, *, empty: Empty = "identity") -> Selection:
        """Make a selection from deterministic gates (0: removed, else: kept with that scale).

        Raises:
            ConfigError: wrong shape, a value that is not finite, no hidden dimension or no row of a pooler left, or a
                unit removed that the family cannot lose exactly.
        """
        full = {kind: gate.detach().float().cpu().clone() for kind, gate in complete(structure, gates).items()}
        for kind, gate in full.items():
            if not gate.isfinite().all():
                raise ConfigError(f"gate '{kind}' holds values that are not finite: no selection can be made from it")
        reason = structure.family.refusal(kind for kind, gate in full.items() if (gate != 1).any())
        if reason is not None:
            raise ConfigError(reason)
        if not full["hidden"].any():
            raise ConfigError("no hidden dimension is left: a model needs at least one")
        if "pooler" in full and not full["pooler"].any():
            raise ConfigError("no row of the pooler is left: a classifier needs at least one")
        return cls(full, empty)

    def gate(self, space: Space) -> Tensor:
        """What multiplies each unit of a space, coarser gates over it included: [size] fp64."""
        if space.index is None:
            # Selections from before poolers had gates lack them, and keep all of it.
            return self.gates.get(space.kind, torch.ones(space.size)).double()
        return self._units[space.kind][space.index]

    @cached_property
    def _units(self) -> dict[str, Tensor]:
        # In double: a product of gates must not be rounded before it meets the weight.
        return unit_gates({kind: gate.double() for kind, gate in self.gates.items()})

    @cached_property
    def _alive(self) -> dict[str, list[bool]]:
        return {kind: alive.tolist() for kind, alive in sublayer_alive(self.gates).items()}

    def kept(self, space: Space) -> Tensor:
        """Indices of the kept units of a space, ascending: [kept] int64. Units of a removed sublayer are gone."""
        return self.gate(space).nonzero().flatten()

    def alive(self, kind: str, index: int) -> bool:
        """Whether a sublayer, by its place among those of its kind, still exists in the exported model."""
        return self.empty == "bias" or self.has_units(kind, index)

    def has_units(self, kind: str, index: int) -> bool:
        """Whether a sublayer, by its place among those of its kind, has a unit left, and a row to write."""
        return self._alive[kind][index]

    def hard(self) -> dict[str, Tensor]:
        """The same choice with every scale at 1."""
        return {kind: (gate != 0).float() for kind, gate in self.gates.items()}

    def layer_sizes(self, structure: Structure) -> list[dict[str, Any]]:
        """What is kept, layer by layer.

        Returns:
            `heads` (or groups of them) and `ffn_dim`. Where heads are gone, `kept_heads`; where a kept head lost
            dimensions, `qk_dims` and `vo_dims`, one number a kept head; where those are rotary pairs, `qk_pairs`
            as well: a bit for each pair of a head, as a hexadecimal number. Where a sublayer writes only some of
            the kept hidden dimensions, `attn_rows` or `ffn_rows`: a bit for each of those, as a hexadecimal
            number. What a layer has beside its first attention and its FFN (cross attention) stands in a table by its
            name.
        """
        by_layer: list[dict[str, Any]] = [{} for _ in range(structure.sizes.num_layers)]
        hidden = self.kept(structure.hidden)
        for sublayer in structure.sublayers:
            sizes = by_layer[sublayer.layer]
            if sublayer.name not in ("attention", "ffn"):
                sizes = sizes.setdefault(sublayer.name, {})
            if sublayer.kind == "ffn":
                sizes["ffn_dim"] = len(self.kept(sublayer.units))
            else:
                sizes |= self._head_sizes(structure.sizes, sublayer)
            written = (self.gate(sublayer.rows) != 0)[hidden]
            if self.alive(sublayer.kind, sublayer.index) and not written.all():
                sizes[f"{sublayer.kind}_rows"] = _hex(written)
        return by_layer

    def _head_sizes(self, sizes: Sizes, sublayer: Sublayer) -> dict[str, Any]:
        writes = (self.gate(sublayer.rows) != 0).any()
        alive = head_alive(self.gates)[sublayer.index] & writes
        assert sublayer.queries is not None
        queries, values = (
            by_head(self.gate(space) != 0, sizes.num_groups)[alive] for space in (sublayer.queries, sublayer.units)
        )
        dims: dict[str, Any] = {
            "qk_dims": (queries.sum(-1) * sizes.pair).tolist(),
            "vo_dims": values.sum(-1).tolist(),
        }
        if sizes.pair > 1 and not queries.all():
            dims["qk_pairs"] = [_hex(pairs) for pairs in queries]
        ragged = not (queries.all() and values.all())
        which = {} if alive.all() else {"kept_heads": alive.nonzero().flatten().tolist()}
        return {"heads": int(alive.sum()), **which, **(dims if ragged else {})}

    def save(self, path: Path, **metadata: Any) -> None:
        """Write to a safetensors file; `metadata` values are kept as JSON."""
        text = {"empty": self.empty, **{key: json.dumps(value) for key, value in metadata.items()}}
        save_file({kind: gate.contiguous() for kind, gate in self.gates.items()}, path, metadata=text)

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, damaged or foreign file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                empty = (file.metadata() or {}).get("empty")
                gates = {kind: file.get_tensor(kind) for kind in file.keys()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the selection {path}: {error}") from error
        if empty not in ("identity", "bias") or set(gates) | {"pooler"} != set(GATE_KINDS):
            raise CheckpointError(f"{path} is not a selection: it lacks gates, or what an empty sublayer computes")
        if not all(gate.isfinite().all() for gate in gates.values()) or not gates["hidden"].any():
            raise CheckpointError(
                f"{path} holds an impossible selection: gates not finite, or no hidden dimension left"
            )
        return cls(gates, empty)  # type: ignore[arg-type]


def _hex(bits: Tensor) -> str:
    """Bits as a hexadecimal number, the first bit the most significant."""
    return f"{int(''.join('01'[int(bit)] for bit in bits), 2):x}"
