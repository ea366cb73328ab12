"""What MLPruning's authors' code leaves (arXiv 2105.14636; yaozhewei/MLPruning, 5483912).

First step: the folder of a `MaskedBertFor...`, dense weights and, beside those of each linear, scores and the logit of
the share that is kept: `head_mask_scores` [H, 1] and `threshold_head` [1] of query, key and value, which share them;
`mask_scores` [rows, 1] and `threshold_row` [1] of the two output linears and of the first of the FFN. Of n units the
ceil(sigmoid(threshold) * n) with the highest scores are kept.

Second step: matrices cut by those masks, the numbers of kept rows rounded up to whole blocks, and beside each
`block_mask_scores` [blocks, 1, 1], block row after block row, and `threshold_block` [1]. Which rows are left it does
not tell, nor the size of a block: it makes a model only together with the folder of the first step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dsprune.errors import ArchitectureError, CheckpointError
from dsprune.migrate.dense import Dense, parameters
from dsprune.migrate.foreign import Foreign
from dsprune.structure import BlockSelection, Selection, analyze_blocks, gate_shapes

__all__ = ["read_blocks", "read_mlpruning", "unscored"]

logger = logging.getLogger(__name__)
SCORES_OF = {"row": "mask_scores", "head": "head_mask_scores", "block": "block_mask_scores"}
SCORES = ("mask_scores", "threshold_row", "head_mask_scores", "threshold_head")
BLOCK_SCORES = ("block_mask_scores", "threshold_block")


def unscored(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own weights."""
    return {name: tensor for name, tensor in weights.items() if name.rpartition(".")[2] not in SCORES}


def read_mlpruning(foreign: Foreign, dense: Dense, *, side: int = 1) -> tuple[dict[str, Tensor], Selection]:
    """Dense parameters of the first step, and the selection that makes the pruned model of them.

    Args:
        foreign: as it was found.
        dense: the model that it was.
        side: rows of a block of the second step, to whole numbers of which the kept rows are rounded up.

    Raises:
        ArchitectureError: an activation under which a masked neuron would still say something.
        CheckpointError: scores that are missing, or that do not fit the model.
    """
    structure, names = dense.structure, {name.rpartition(".")[2] for name in foreign.weights}
    if names & set(BLOCK_SCORES):
        raise CheckpointError(
            f"{foreign.path} is of MLPruning's second step: its matrices are cut, and which rows are left only the "
            "folder of the first step tells: give that as --first-step, and the size of a block as --block"
        )
    if not names & set(SCORES):
        raise CheckpointError(f"{foreign.path} holds no scores ({', '.join(SCORES)}): it is no model of MLPruning's")
    activation = str(dense.config.get("hidden_act", "gelu"))
    if float(ACT2FN[activation](torch.zeros(()))) != 0:
        raise ArchitectureError(f"{foreign.path}: masked neurons give out {activation}(0), which is not 0")
    shapes = gate_shapes(structure.sizes)
    gates = {kind: torch.ones(shapes[kind]) for kind in ("head", "ffn_dim", "attn_row", "ffn_row")}
    for sublayer in structure.sublayers:
        layer, index = structure.layer_paths[sublayer.layer], sublayer.index
        gates[f"{sublayer.kind}_row"][index] = _kept(foreign, sublayer.output, "row", shapes["attn_row"][1], side)
        if sublayer.kind == "attn":
            gates["head"][index] = _kept(foreign, f"{layer}.attention.self.query", "head", shapes["head"][1])
        else:
            gates["ffn_dim"][index] = _kept(foreign, f"{layer}.intermediate.dense", "row", shapes["ffn_dim"][1], side)
    state = dense.state(foreign, unscored(foreign.weights))
    return state, Selection.from_gates(structure, gates, empty="bias")


def read_blocks(foreign: Foreign, model: nn.Module, block: tuple[int, int]) -> tuple[dict[str, Tensor], BlockSelection]:
    """Parameters of the second step, and the blocks that are kept.

    Args:
        foreign: its folder.
        model: the compact model of the first step, whose shapes are meant; it needs no weights.
        block: rows and columns of a block.

    Raises:
        CheckpointError: weights or scores that are missing, or that do not fit the first step or the blocks.
        ConfigError: blocks larger than every matrix.
    """
    structure = analyze_blocks(model, block)
    masks = {}
    for matrix in structure.matrices:
        path, (rows, columns) = matrix.path, matrix.grid
        if matrix.shape[0] % block[0] or matrix.shape[1] % block[1]:
            raise CheckpointError(
                f"--block {block[0]}x{block[1]}: {path} is {matrix.shape[0]} x {matrix.shape[1]} after the first step, "
                "which is not cut into whole blocks of that size"
            )
        masks[path] = _kept(foreign, path, "block", rows * columns).view(rows, columns)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    own = {name: w for name, w in foreign.weights.items() if name.rpartition(".")[2] not in BLOCK_SCORES}
    owner = f"{type(model).__name__} of the first step's masks"
    return parameters(foreign, unscored(own), shapes, owner), BlockSelection(masks, block)


def _kept(foreign: Foreign, path: str, kind: str, size: int, side: int = 1) -> Tensor:
    """Which units of a linear its scores keep: [size] of 0 and 1; all where it has none.

    Args:
        foreign: as it was found.
        path: of the linear.
        kind: of the units: row, head or block.
        size: number of units.
        side: their number is rounded up to a multiple of this.
    """
    scores = foreign.weights.get(f"{path}.{SCORES_OF[kind]}")
    theta = foreign.weights.get(f"{path}.threshold_{kind}")
    if scores is None and theta is None:
        return torch.ones(size)
    if scores is None or theta is None or scores.numel() != size or theta.numel() != 1:
        found = "none" if scores is None else str(scores.numel())
        raise CheckpointError(f"{foreign.path}: {path} has {found} scores of a {kind}, and there would be {size}")
    # As they compute it: the sigmoid in fp32, the product in fp64.
    count = math.ceil(torch.sigmoid(theta.float()).item() * size)
    count = min(-(-count // side) * side, size)
    order = scores.float().flatten().sort(descending=True, stable=True)
    if count < size and bool(order.values[count - 1] == order.values[count]):
        logger.warning(
            "%s: units on both sides of the cut have the same score, and which of them the authors' code keeps is up "
            "to the sorting of the device: here the first ones",
            path,
        )
    kept = torch.zeros(size)
    kept[order.indices[:count]] = 1
    return kept
