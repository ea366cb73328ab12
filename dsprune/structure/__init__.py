"""What can be pruned: spaces, gates and how they apply, exact cost, selections, surgery. Pure torch."""

from dsprune.structure.cost import CostModel, Scope
from dsprune.structure.gating import (
    Gates,
    Gating,
    attach_gates,
    by_head,
    complete,
    ffn_alive,
    head_alive,
    ones,
    sublayer_alive,
    unit_gates,
)
from dsprune.structure.magnitude import unit_magnitudes
from dsprune.structure.selection import Selection
from dsprune.structure.spaces import (
    GATE_KINDS,
    Empty,
    ParamSpec,
    Sizes,
    Space,
    Structure,
    Sublayer,
    analyze,
    gate_shapes,
)
from dsprune.structure.surgery import compact_shape, cut, is_removed

__all__ = [
    "GATE_KINDS",
    "CostModel",
    "Empty",
    "Gates",
    "Gating",
    "ParamSpec",
    "Scope",
    "Selection",
    "Sizes",
    "Space",
    "Structure",
    "Sublayer",
    "analyze",
    "attach_gates",
    "by_head",
    "compact_shape",
    "complete",
    "cut",
    "ffn_alive",
    "gate_shapes",
    "head_alive",
    "is_removed",
    "ones",
    "sublayer_alive",
    "unit_gates",
    "unit_magnitudes",
]
