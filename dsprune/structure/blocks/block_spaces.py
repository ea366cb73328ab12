"""The matrices of a compact model that blocks can be removed from, and what a choice of blocks costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsprune.arch import family_for
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.structure.blocks.grid import block_areas, block_grid
from dsprune.structure.kernels import sum_blocks
from dsprune.structure.layout import base_path
from dsprune.structure.spaces import join, param_shape

__all__ = ["BlockMatrix", "BlockStructure", "analyze_blocks", "block_magnitudes"]


@dataclass(frozen=True)
class BlockMatrix:
    """One weight matrix of the encoder.

    Attributes:
        path: of its linear, from the root of the model; also the name of its gate.
        layer: index of its layer.
        place: path of the linear inside the layer.
        shape: [out, in].
        block: rows and columns of a block.
    """

    path: str
    layer: int
    place: str
    shape: tuple[int, int]
    block: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return block_grid(self.shape, self.block)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class BlockStructure:
    """What blocks can be removed from, with the parameters of the model and of the dense one it came from."""

    matrices: tuple[BlockMatrix, ...]
    parameters: Mapping[str, int]
    dense: Mapping[str, int]

    @property
    def gate_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of the gates of each matrix, by path."""
        return {matrix.path: matrix.grid for matrix in self.matrices}

    def refusal(self, kinds: Iterable[str]) -> str | None:
        """None: `analyze_blocks` has refused the families that cannot lose blocks."""
        return None

    def unit_of(self, kind: str) -> str:
        """Every matrix has gates of its own, and what they decide over are blocks."""
        return "block"

    def nonzeros(self, masks: Mapping[str, Tensor]) -> int:
        """Encoder parameters inside kept blocks or outside of all matrices; padding does not count."""
        lost = sum(
            int((block_areas(matrix.shape, matrix.block) * (masks[matrix.path] == 0)).sum()) for matrix in self.matrices
        )
        return self.parameters["encoder"] - lost

    def remaining(self, gates: Mapping[str, Tensor]) -> Tensor:
        """Encoder parameters that are stored, padding of edge blocks included; [] float64.

        A matrix without gates is whole. With gates in {0, 1} this is the count of the exported model; a matrix whose
        gates are all open is stored dense, without padding.
        """
        total = torch.tensor(float(self.parameters["encoder"]), dtype=torch.float64)
        for matrix in self.matrices:
            if matrix.path not in gates:
                continue
            gate = gates[matrix.path].double()
            stored = gate.sum() * matrix.block[0] * matrix.block[1]
            whole = bool((gate.detach() == 1).all())
            total = total + (0.0 if whole else stored - matrix.numel)
        return total


def analyze_blocks(model: nn.Module, block: tuple[int, int]) -> BlockStructure:
    """Find the matrices of a compact model's layers.

    Args:
        model: a compact model, on any device, the meta device included.
        block: rows and columns of a block.

    A matrix that pruning left smaller than a block is not among them: it stays dense.

    Raises:
        ConfigError: blocks larger than every matrix.
        ArchitectureError: not a compact model, one whose heads are packed, or a family that cannot lose blocks.
    """
    facts: Any = getattr(model.config, "dsprune", None)
    if not facts:
        raise ArchitectureError("blocks are removed from compact models: run a pruning method first")
    config: Any = model.config
    family = family_for(str(config.model_type).removeprefix("dsprune_"))
    if family.blocks_refusal is not None:
        raise ArchitectureError(family.blocks_refusal)
    base = base_path(model)
    stacks = {stack.name: stack for stack in family.stacks}
    numbers: Counter[str] = Counter()
    matrices = []
    for layer, sizes in enumerate(facts["layers"]):
        stack = stacks[sizes.get("stack", "")]
        attentions = (sizes.get(spec.name, sizes) for spec in stack.sublayers if spec.kind == "attn")
        if any(not own.keys().isdisjoint(("qk_dims", "vo_dims")) for own in attentions):
            raise ArchitectureError(
                f"layer {layer} holds heads of unequal size: blocks are removed from heads of one size only"
            )
        root = join(base, stack.layers, str(numbers[stack.name]))
        numbers[stack.name] += 1
        for place in stack.layer:
            module = _module(model, f"{root}.{place}")
            if isinstance(module, nn.Linear):
                rows, columns = param_shape(module.weight)
                if rows >= block[0] and columns >= block[1]:
                    matrices.append(BlockMatrix(f"{root}.{place}", layer, place, (rows, columns), block))
    if not matrices:
        raise ConfigError(f"blocks.shape: no matrix of the compact model holds a block of {block[0]} x {block[1]}")
    counted = facts["parameters"]
    return BlockStructure(
        tuple(matrices),
        {of: counted[of] for of in ("encoder", "total")},
        {of: counted[f"dense_{of}"] for of in ("encoder", "total")},
    )


def _module(model: nn.Module, path: str) -> nn.Module | None:
    """A module, or None where a removed sublayer has left none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def block_magnitudes(structure: BlockStructure, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Euclidean norm of each block's weights, by path: [block rows, block columns] fp64 on the CPU.

    Args:
        structure: from `analyze_blocks`.
        read: whole value of a parameter by name.
    """
    norms = {}
    for matrix in structure.matrices:
        squares = read(f"{matrix.path}.weight").detach().double().cpu().square()
        norms[matrix.path] = sum_blocks(squares, matrix.block, matrix.grid).sqrt()
    return norms
