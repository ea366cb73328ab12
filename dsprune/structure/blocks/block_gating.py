"""Gates on the blocks of a live compact model's matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dsprune.errors import ConfigError
from dsprune.structure.blocks.block_spaces import BlockStructure
from dsprune.structure.kernels import block_gated_linear

__all__ = ["BlockGating"]


@dataclass
class _Site:
    gate: Tensor | None = None


def _forward(gating: BlockGating, module: Any, site: _Site, block: tuple[int, int], x: Tensor) -> Tensor:
    if site.gate is None:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return block_gated_linear(x, module.weight, module.bias, site.gate, block, frozen=gating.frozen)


class BlockGating:
    """Gates of blocks, attached to one model; the counterpart of `Gating`.

    Args:
        model: the compact model that `structure` was made from.
        structure: from `analyze_blocks`.
    """

    def __init__(self, model: nn.Module, structure: BlockStructure) -> None:
        self.structure = structure
        self.frozen = False
        self._sites: dict[str, _Site] = {}
        self._patched: list[nn.Module] = []
        for matrix in structure.matrices:
            module = model.get_submodule(matrix.path)
            site = self._sites[matrix.path] = _Site()
            module.forward = partial(_forward, self, module, site, matrix.block)
            self._patched.append(module)

    def set(self, gates: Mapping[str, Tensor] | None) -> None:
        """Let the next forward passes use these gates, [block rows, block columns] by path; None is the whole model.

        Raises:
            ConfigError: a gate that is missing, or of another shape.
        """
        shapes = self.structure.gate_shapes
        for path, site in self._sites.items():
            if gates is not None and tuple(gates[path].shape if path in gates else ()) != shapes[path]:
                raise ConfigError(f"the gate of {path} needs the shape {list(shapes[path])}")
            site.gate = None if gates is None else gates[path]

    def remove(self) -> None:
        """Take the gates off: the model's modules get their own forward back."""
        for module in self._patched:
            del module.forward
        self._patched.clear()
