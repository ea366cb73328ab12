"""Blocks of a weight matrix: their grid, their sizes, and the block-sparse layout that a compact model stores.

The layout is BSR: the kept blocks of a block row stand side by side, block row after block row. Where the
block size does not divide the matrix, the blocks of the last row and column reach beyond it; what is beyond is
stored as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dsprune.errors import ConfigError

__all__ = ["block_areas", "block_grid", "from_blocks", "stored_numbers", "to_blocks"]


def block_grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, int]:
    """Block rows and block columns of a matrix, the last ones rounded up.

    Args:
        shape: [out, in].
        block: rows and columns of a block.

    Raises:
        ConfigError: a block larger than the matrix, or without rows or columns.
    """
    rows, columns = (int(size) for size in block)
    out, inside = (int(size) for size in shape)
    if rows < 1 or columns < 1:
        raise ConfigError(f"a block of {rows} x {columns} holds nothing: give at least 1 x 1")
    if rows > out or columns > inside:
        raise ConfigError(
            f"blocks of {rows} x {columns} are larger than a matrix of {out} x {inside}: give smaller ones"
        )
    return -(-out // rows), -(-inside // columns)


def block_areas(shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Numbers of the matrix in each block, int64 [block rows, block columns]; padding does not count.

    Times a mask and summed, this is how many weights a mask keeps; soft masks keep their gradient.

    Raises:
        ConfigError: as `block_grid`.
    """
    grid = block_grid(shape, block)
    sides = []
    for size, side, count in zip(shape, block, grid, strict=True):
        lengths = torch.full((count,), int(side))
        lengths[-1] = int(size) - (count - 1) * int(side)
        sides.append(lengths)
    return torch.outer(*sides)


def stored_numbers(mask: Tensor, block: Sequence[int]) -> int:
    """How many values a mask [block rows, block columns] makes the layout store, padding included."""
    return int(mask.bool().sum()) * math.prod(int(side) for side in block)


def to_blocks(weight: Tensor, mask: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The kept blocks of a matrix.

    Args:
        weight: [out, in].
        mask: [block rows, block columns], nonzero where a block is kept.
        block: rows and columns of a block.

    Returns:
        values [kept, *block], zero beyond the matrix; row_pointers int32 [block rows + 1], where the blocks of
        each block row begin and the last ends; columns int32 [kept], the block column of each, ascending in a row.

    Raises:
        ConfigError: as `block_grid`.
        ValueError: a mask of another grid.
    """
    grid = block_grid(weight.shape, block)
    if tuple(mask.shape) != grid:
        raise ValueError(f"the mask has the shape {tuple(mask.shape)}, the blocks of this matrix {grid}")
    (rows, columns), (height, width) = grid, block
    kept = mask.bool().to(weight.device)
    padding = (0, columns * width - weight.shape[1], 0, rows * height - weight.shape[0])
    tiles = functional.pad(weight, padding).view(rows, height, columns, width).transpose(1, 2)
    pointers = functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return tiles[kept], pointers.int(), kept.nonzero()[:, 1].int()


def from_blocks(values: Tensor, row_pointers: Tensor, columns: Tensor, shape: Sequence[int]) -> Tensor:
    """The matrix [out, in] that `to_blocks` took apart, zero where no block was kept.

    Args:
        values: [kept, rows, columns of a block].
        row_pointers: [block rows + 1].
        columns: [kept].
        shape: out and in.

    Raises:
        ConfigError: as `block_grid`.
    """
    out, inside = shape
    height, width = values.shape[1:]
    grid = block_grid(shape, (height, width))
    rows = torch.repeat_interleave(torch.arange(grid[0], device=values.device), row_pointers.diff())
    tiles = values.new_zeros(*grid, height, width).index_put((rows, columns.long()), values)
    return tiles.transpose(1, 2).reshape(grid[0] * height, grid[1] * width)[:out, :inside]
