"""A Selection: the final choice of what is kept, and the scale of what is kept.

It is the narrow waist between methods, which make one, and surgery, cost and consolidation, which
only ever see one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsprune.errors import CheckpointError, ConfigError
from dsprune.structure.gating import Gates, complete, head_alive, sublayer_alive, unit_gates
from dsprune.structure.spaces import GATE_KINDS, Empty, Sizes, Space, Structure, Sublayer

__all__ = ["Selection"]


@dataclass(frozen=True)
class Selection:
    """Kept units and their scales for every space of a structure.

    Attributes:
        gates: every kind of gate, fp32 on the CPU; 0 removes a unit, anything else keeps it and is
            its scale, to be folded into the weights.
        empty: what a sublayer without units computes.
    """

    gates: Mapping[str, Tensor]
    empty: Empty = "identity"

    @classmethod
    def from_gates(cls, structure: Structure, gates: Gates, *, empty: Empty = "identity") -> Selection:
        """Make a selection from deterministic gates (0: removed, else: kept with that scale).

        Raises:
            ConfigError: wrong shape, a value that is not finite, or no hidden dimension left.
        """
        full = {kind: gate.detach().float().cpu().clone() for kind, gate in complete(structure, gates).items()}
        for kind, gate in full.items():
            if not gate.isfinite().all():
                raise ConfigError(f"gate '{kind}' holds values that are not finite: no selection can be made from it")
        if not full["hidden"].any():
            raise ConfigError("no hidden dimension is left: a model needs at least one")
        return cls(full, empty)

    def gate(self, space: Space) -> Tensor:
        """What multiplies each unit of a space, coarser gates over it included: [size] fp64."""
        if space.layer is None:
            return self.gates[space.kind].double()
        # In double: a product of gates must not be rounded before it meets the weight.
        return unit_gates({kind: gate.double() for kind, gate in self.gates.items()})[space.kind][space.layer]

    def kept(self, space: Space) -> Tensor:
        """Indices of the kept units of a space, ascending: [kept] int64. Units of a removed sublayer are gone."""
        return self.gate(space).nonzero().flatten()

    def alive(self, kind: str, layer: int) -> bool:
        """Whether the `attn` or `ffn` sublayer of a layer still exists in the exported model."""
        return self.empty == "bias" or bool(sublayer_alive(self.gates)[kind][layer])

    def hard(self) -> dict[str, Tensor]:
        """The same choice with every scale at 1."""
        return {kind: (gate != 0).float() for kind, gate in self.gates.items()}

    def layer_sizes(self, structure: Structure) -> list[dict[str, Any]]:
        """What is kept, layer by layer.

        Returns:
            `heads` and `ffn_dim`. Where heads are gone, `kept_heads`; where a kept head lost dimensions,
            `qk_dims` and `vo_dims`, one number a kept head; where a sublayer writes only some of the kept
            hidden dimensions, `attn_rows` or `ffn_rows`: a bit for each of those, as a hexadecimal number.
        """
        by_layer: list[dict[str, Any]] = [{} for _ in range(structure.sizes.num_layers)]
        hidden = self.kept(structure.hidden)
        for sublayer in structure.sublayers:
            sizes = by_layer[sublayer.layer]
            if sublayer.kind == "ffn":
                sizes["ffn_dim"] = len(self.kept(sublayer.units))
            else:
                sizes |= self._head_sizes(structure.sizes, sublayer)
            written = (self.gate(sublayer.rows) != 0)[hidden]
            if self.alive(sublayer.kind, sublayer.layer) and not written.all():
                sizes[f"{sublayer.kind}_rows"] = _hex(written)
        return by_layer

    def _head_sizes(self, sizes: Sizes, sublayer: Sublayer) -> dict[str, Any]:
        writes = (self.gate(sublayer.rows) != 0).any()
        alive = head_alive(self.gates)[sublayer.layer] & writes
        dims = {}
        for name, space in (("qk_dims", sublayer.queries), ("vo_dims", sublayer.units)):
            assert space is not None
            counts = torch.zeros(sizes.num_heads, dtype=torch.int64)
            counts.index_add_(
                0, self.kept(space) // sizes.head_dim, torch.ones(len(self.kept(space)), dtype=torch.int64)
            )
            dims[name] = counts[alive].tolist()
        ragged = any(count != sizes.head_dim for counts in dims.values() for count in counts)
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
        if empty not in ("identity", "bias") or set(gates) != set(GATE_KINDS):
            raise CheckpointError(f"{path} is not a selection: it lacks gates, or what an empty sublayer computes")
        if not all(gate.isfinite().all() for gate in gates.values()) or not gates["hidden"].any():
            raise CheckpointError(
                f"{path} holds an impossible selection: gates not finite, or no hidden dimension left"
            )
        return cls(gates, empty)  # type: ignore[arg-type]


def _hex(bits: Tensor) -> str:
    """Bits as a hexadecimal number, the first bit the most significant."""
    return f"{int(''.join('01'[int(bit)] for bit in bits), 2):x}"
