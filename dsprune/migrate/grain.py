"""What GRAIN's authors' code leaves (arXiv 2212.07634; airaria/GRAIN, 8d02105).

`gs<step>.pt`: the state of a BERT whose linears carry masks of `torch.nn.utils.prune` (`weight_orig`, `weight_mask`,
`bias_orig`, `bias_mask`): rows of query, key and value, columns of the two output linears; or, by their pruner of
heads and neurons, columns of the output linears alone. A factored word embedding is the table `word_embeddings` [V, r]
and the linear `proj` [d, r] after it. No configuration lies beside it: theirs is that of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsprune.errors import CheckpointError
from dsprune.migrate.dense import Dense
from dsprune.migrate.foreign import Foreign
from dsprune.structure import Selection, Structure, Sublayer, gate_shapes

__all__ = ["embedding_rank", "read_grain", "unmasked"]

PROJECTION = ".embeddings.proj.weight"


def embedding_rank(foreign: Foreign) -> int | None:
    """Of the word embedding; None where it is one table."""
    return next((tensor.shape[1] for name, tensor in foreign.weights.items() if name.endswith(PROJECTION)), None)


def unmasked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that they have without masks, and the factored embedding as dsprune names it."""
    factored = any(name.endswith(PROJECTION) for name in weights)
    named = {}
    for name, tensor in weights.items():
        if name.endswith("_mask"):
            continue
        name = name.removesuffix("_orig")
        if factored and name.endswith(".embeddings.word_embeddings.weight"):
            name = name.replace("word_embeddings.weight", "word_embeddings.table.weight")
        elif name.endswith(PROJECTION):
            name = name.replace("proj.weight", "word_embeddings.projection.weight")
        named[name] = tensor
    return named


def read_grain(foreign: Foreign, dense: Dense) -> tuple[dict[str, Tensor], Selection]:
    """Dense parameters and the selection that makes the pruned model of them.

    Raises:
        CheckpointError: masks that are missing, or not of whole units.
    """
    structure = dense.structure
    shapes = gate_shapes(structure.sizes)
    gates = {kind: torch.ones(shapes[kind]) for kind in ("qk_dim", "vo_dim", "ffn_dim")}
    if not any(name.endswith("_mask") for name in foreign.weights):
        raise CheckpointError(
            f"{foreign.path} holds no masks (names that end with _mask): pruning had not begun, or it is no state of "
            "GRAIN's"
        )
    for sublayer in structure.sublayers:
        mask = _columns(foreign, sublayer.output)
        if sublayer.kind == "ffn":
            gates["ffn_dim"][sublayer.index] = mask
        else:
            gates["vo_dim"][sublayer.index] = mask
            gates["qk_dim"][sublayer.index] = _queries(foreign, structure, sublayer, mask)
    state = dense.state(foreign, unmasked(foreign.weights))
    return state, Selection.from_gates(structure, gates, empty="bias")


def _columns(foreign: Foreign, path: str) -> Tensor:
    """Which columns of a linear's weight are on: [columns]; all where it has no mask."""
    name = f"{path}.weight_mask"
    if name not in foreign.weights:
        weight = foreign.weights.get(f"{path}.weight", foreign.weights.get(f"{path}.weight_orig"))
        if weight is None:
            raise CheckpointError(f"{foreign.path} lacks {path}.weight")
        return torch.ones(weight.shape[1])
    return _whole_units(foreign, name, foreign.weights[name].T)


def _rows(foreign: Foreign, path: str) -> Tensor | None:
    """Which rows of a linear are on, weight and bias alike: [rows]; None where it has no masks."""
    name = f"{path}.weight_mask"
    if name not in foreign.weights:
        return None
    mask = _whole_units(foreign, name, foreign.weights[name])
    bias = foreign.weights.get(f"{path}.bias_mask")
    if bias is not None and not torch.equal(bias.float(), mask):
        raise CheckpointError(f"{foreign.path}: the masks of weight and bias of {path} differ")
    return mask


def _whole_units(foreign: Foreign, name: str, mask: Tensor) -> Tensor:
    mask = mask.float()
    if not torch.equal(mask, mask[:, :1].expand_as(mask)) or not bool(((mask == 0) | (mask == 1)).all()):
        raise CheckpointError(f"{foreign.path}: {name} is not 0 or 1 by whole units: it is no mask of GRAIN's")
    return mask[:, 0]


def _queries(foreign: Foreign, structure: Structure, attention: Sublayer, values: Tensor) -> Tensor:
    """Which query units are on; the masks of keys and of values have to say the same as their partners'."""
    layer = structure.layer_paths[attention.layer]
    found = {part: _rows(foreign, f"{layer}.attention.self.{part}") for part in ("query", "key", "value")}
    for part, partner in (("key", found["query"]), ("value", values)):
        mask = found[part]
        if mask is not None and (partner is None or not torch.equal(mask, partner)):
            raise CheckpointError(f"{foreign.path}: {layer}.attention.self.{part} and its partner have unlike masks")
    return torch.ones_like(values) if found["query"] is None else found["query"]
