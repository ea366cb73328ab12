"""What can be pruned: spaces, gates and how they apply, exact cost, selections, surgery. Pure torch."""

from dsprune.structure.analysis import analyze
from dsprune.structure.blocks.block_gating import BlockGating
from dsprune.structure.blocks.block_selection import BlockSelection
from dsprune.structure.blocks.block_spaces import BlockMatrix, BlockStructure, analyze_blocks, block_magnitudes
from dsprune.structure.blocks.grid import block_grid, to_blocks
from dsprune.structure.budget import Budget, Counted, block_budget, budget_for
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
from dsprune.structure.prunable import Choice, Prunable
from dsprune.structure.selection import Selection
from dsprune.structure.shapes import (
    check_shape,
    find_shape,
    follow_hidden,
    shape_gates,
    shape_kinds,
    sharable_kinds,
    stock_heads_fit,
)
from dsprune.structure.spaces import (
    GATE_KINDS,
    Axis,
    Empty,
    ParamSpec,
    Segment,
    Sizes,
    Space,
    Structure,
    Sublayer,
    gate_shapes,
)
from dsprune.structure.surgery import compact_shape, cut, is_removed

__all__ = [
    "GATE_KINDS",
    "Axis",
    "BlockGating",
    "BlockMatrix",
    "BlockSelection",
    "BlockStructure",
    "Budget",
    "Choice",
    "CostModel",
    "Counted",
    "Empty",
    "Gates",
    "Gating",
    "ParamSpec",
    "Prunable",
    "Scope",
    "Segment",
    "Selection",
    "Sizes",
    "Space",
    "Structure",
    "Sublayer",
    "analyze",
    "analyze_blocks",
    "attach_gates",
    "block_budget",
    "block_grid",
    "block_magnitudes",
    "budget_for",
    "by_head",
    "check_shape",
    "compact_shape",
    "complete",
    "cut",
    "ffn_alive",
    "find_shape",
    "follow_hidden",
    "gate_shapes",
    "head_alive",
    "is_removed",
    "ones",
    "shape_gates",
    "shape_kinds",
    "sharable_kinds",
    "stock_heads_fit",
    "sublayer_alive",
    "to_blocks",
    "unit_gates",
    "unit_magnitudes",
]
