"""What CoFi's authors' code leaves (arXiv 2204.00408; princeton-nlp/CoFiPruning, da855a8).

Two forms. While masks are learned: dense weights, and in `zs.pt` the masks that evaluation uses, one tensor a kind:
`head_z` [L, 1, H, 1, 1], `head_layer_z` [L], `intermediate_z` [L, 1, 1, F], `mlp_z` [L], `hidden_z` [d]. What they
keep they scale, a little below 1. After fine-tuning, and in the released models: weights that are cut, under the names
of the dense model and beside its configuration; a sublayer without linears is gone. Which units they were is not told,
and does not matter any more.

Where masks leave a sublayer without units but its own mask is on, their masked model keeps its output bias and norm,
and their cut one is without it (their issue 36): the cut one is what they evaluate and release, and what is made here.
Where `hidden_z` scales what it keeps, their cut model differs from their masked one, whose residual stream is scaled
but whose cut norms are not: what is made here equals the masked one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsprune.errors import CheckpointError
from dsprune.migrate.dense import Dense
from dsprune.migrate.foreign import Foreign, listed, read_tensors
from dsprune.structure import Selection, Structure, compact_shape, gate_shapes, is_removed

__all__ = ["read_cofi"]

MASKS = {
    "head_z": "head",
    "head_layer_z": "attn",
    "intermediate_z": "ffn_dim",
    "mlp_z": "ffn",
    "hidden_z": "hidden",
}
"""Their masks, and our gates."""


def read_cofi(foreign: Foreign, dense: Dense) -> tuple[dict[str, Tensor], Selection]:
    """Dense parameters and the selection that makes the pruned model of them.

    Raises:
        ConfigError: masks that make no model.
        CheckpointError: masks that are missing, or that do not fit the weights.
    """
    shapes = dense.shapes
    cut = any(
        tuple(foreign.weights[name].shape) != shapes[name] if name in foreign.weights else True for name in shapes
    )
    path = foreign.folder / "zs.pt"
    if not cut:
        gates = _gates(dense.structure, _read_masks(path), path)
        return dense.state(foreign, foreign.weights), Selection.from_gates(dense.structure, gates, empty="identity")
    selection = Selection.from_gates(dense.structure, _prefix_gates(foreign, dense.structure), empty="identity")
    return _widened(foreign, dense, selection), selection


def _read_masks(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        return read_tensors(path)
    pickled = path.with_name("l0_module.pt")
    hint = f"; {pickled.name} is an object of their code, which is not opened" if pickled.is_file() else ""
    raise CheckpointError(
        f"the weights in {path.parent} are dense, and there is no zs.pt that says what is pruned{hint}"
    )


def _gates(structure: Structure, masks: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    unknown = [name for name in masks if name not in MASKS]
    if unknown or not masks:
        raise CheckpointError(f"{path} holds {listed(unknown) or 'no masks'}: CoFi's are {', '.join(MASKS)}")
    shapes, gates = gate_shapes(structure.sizes), {}
    for name, mask in masks.items():
        shape = shapes[MASKS[name]]
        if [size for size in mask.shape if size != 1] != [size for size in shape if size != 1]:
            raise CheckpointError(
                f"{path}: '{name}' has shape {list(mask.shape)}, and the model's would be {list(shape)} "
                "(apart from sizes of 1)"
            )
        gates[MASKS[name]] = mask.float().reshape(shape)
    return gates


def _prefix_gates(foreign: Foreign, structure: Structure) -> dict[str, Tensor]:
    """As many first units as the cut weights have; where linears are missing, no sublayer."""
    shapes = gate_shapes(structure.sizes)
    gates = {kind: torch.ones(shapes[kind]) for kind in MASKS.values()}
    base, weights = structure.base, foreign.weights
    words = weights.get(f"{base}.{structure.family.word_embeddings}.weight")
    if words is not None:
        gates["hidden"][words.shape[-1] :] = 0
    for sublayer in structure.sublayers:
        output = weights.get(f"{sublayer.output}.weight")
        if output is None:
            gates[sublayer.kind][sublayer.index] = 0
        elif sublayer.kind == "attn":
            gates["head"][sublayer.index, output.shape[1] // structure.sizes.head_dim :] = 0
        else:
            gates["ffn_dim"][sublayer.index, output.shape[1] :] = 0
    return gates


def _widened(foreign: Foreign, dense: Dense, selection: Selection) -> dict[str, Tensor]:
    """Cut weights in the first places of dense ones, which are zero elsewhere."""
    wide: dict[str, Tensor] = dict(foreign.weights)
    gone = set()
    for name, param in dense.structure.params.items():
        if is_removed(param, selection):
            # Of a sublayer that is gone a norm may be left.
            wide.pop(name, None)
            gone.add(name)
        elif name in wide:
            expected = compact_shape(param, selection)
            if tuple(wide[name].shape) != expected:
                raise CheckpointError(
                    f"{foreign.path}: {name} has shape {list(wide[name].shape)}, and beside the other weights it would "
                    f"be {list(expected)}"
                )
            full = torch.zeros(param.shape)
            full[tuple(slice(size) for size in expected)] = wide[name].float()
            wide[name] = full
    return dense.state(foreign, wide, gone)
