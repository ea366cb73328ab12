import pytest
import torch

from dsprune.errors import ConfigError
from dsprune.structure.blocks.grid import block_areas, block_grid, from_blocks, stored_numbers, to_blocks

SHAPES = {
    "even": ((64, 96), (32, 32)),
    "odd multiples of 16": ((48, 80), (16, 16)),
    "rows left over": ((70, 64), (32, 32)),
    "columns left over": ((64, 33), (32, 32)),
    "both left over": ((33, 47), (16, 32)),
    "tall": ((40, 24), (32, 8)),
    "one block": ((5, 7), (5, 7)),
}


def _mask(grid, density=0.5):
    return torch.rand(grid) < density


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_there_and_back(case, density):
    shape, block = SHAPES[case]
    weight, mask = torch.randn(shape), _mask(block_grid(shape, block), density)
    values, row_pointers, columns = to_blocks(weight, mask, block)
    assert values.shape == (int(mask.sum()), *block)
    assert row_pointers.dtype == columns.dtype == torch.int32
    wide = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    assert torch.equal(from_blocks(values, row_pointers, columns, shape), weight * wide)


@pytest.mark.parametrize("case", SHAPES)
def test_the_layout_is_that_of_torch(case):
    """Torch itself reads it, and finds its invariants kept."""
    shape, block = SHAPES[case]
    weight, grid = torch.randn(shape), block_grid(shape, block)
    values, row_pointers, columns = to_blocks(weight, _mask(grid), block)
    padded = (grid[0] * block[0], grid[1] * block[1])
    bsr = torch.sparse_bsr_tensor(row_pointers, columns, values, size=padded, check_invariants=True)
    expected = from_blocks(values, row_pointers, columns, shape)
    assert torch.equal(bsr.to_dense()[: shape[0], : shape[1]], expected)


def test_what_is_stored_beyond_the_matrix_is_zero():
    values, _, _ = to_blocks(torch.ones(33, 47), torch.ones(3, 2), (16, 32))
    assert values.shape == (6, 16, 32)
    assert int(values.count_nonzero()) == 33 * 47
    assert values[-1].count_nonzero() == 1 * 15


@pytest.mark.parametrize("case", SHAPES)
def test_counts(case):
    shape, block = SHAPES[case]
    mask = _mask(block_grid(shape, block))
    values, _, _ = to_blocks(torch.ones(shape), mask, block)
    assert int((block_areas(shape, block) * mask).sum()) == int(values.count_nonzero())
    assert stored_numbers(mask, block) == values.numel()
    assert int(block_areas(shape, block).sum()) == shape[0] * shape[1]


def test_gradients_reach_kept_blocks_only():
    weight = torch.randn(20, 20, requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 1]])
    to_blocks(weight, mask, (16, 16))[0].sum().backward()
    expected = torch.zeros(20, 20)
    expected[:16, :16] = expected[16:, 16:] = 1
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("block", [(33, 16), (16, 65), (64, 128)])
def test_a_block_larger_than_the_matrix_is_told(block):
    with pytest.raises(ConfigError, match=f"blocks of {block[0]} x {block[1]} are larger than a matrix of 32 x 64"):
        block_grid((32, 64), block)


def test_a_block_of_nothing_is_told():
    with pytest.raises(ConfigError, match="holds nothing"):
        block_grid((32, 64), (0, 16))


def test_a_mask_of_another_grid_is_told():
    with pytest.raises(ValueError, match=r"the mask has the shape \(2, 2\), the blocks of this matrix \(2, 4\)"):
        to_blocks(torch.ones(32, 64), torch.ones(2, 2), (16, 16))
