"""Blocks of a compact model: gate gradients, masked = written, counted = real; awkward blocks and matrices."""

import pytest
import torch

from dsprune.consolidate import apply_blocks, apply_selection, load_compact
from dsprune.consolidate.modeling_dsprune import BlockLinear
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.structure import (
    BlockGating,
    BlockSelection,
    Selection,
    analyze,
    analyze_blocks,
    block_magnitudes,
    ones,
)
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model

BLOCKS = [(8, 8), (7, 5), (4, 16), (16, 16)]


def _compact(name="bert", *, dtype=torch.float64):
    """What step 1 leaves: fewer heads and neurons, some output rows; sizes that no block divides."""
    model = tiny_model(name, dtype=dtype)
    structure = analyze(model)
    gates = ones(structure)
    gates["head"][0, 1] = gates["head"][1, 2:] = 0
    gates["ffn_dim"][0, ::3] = 0
    gates["attn_row"][0, ::5] = 0
    gates["ffn_row"][:, 3:9] = 0
    return apply_selection(model, Selection.from_gates(structure, gates, empty="bias"))


def _masks(structure, seed=0, kept=0.5):
    generator = torch.Generator().manual_seed(seed)
    masks = {
        path: (torch.rand(grid, generator=generator) < kept).float() for path, grid in structure.gate_shapes.items()
    }
    for mask in masks.values():
        mask[0, 0] = 1
    first = next(iter(masks))
    masks[first] = torch.ones_like(masks[first])  # a matrix that keeps all its blocks stays dense
    return masks


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_model_is_the_masked_model(name, block):
    model = _compact(name)
    structure = analyze_blocks(model, block)
    masks = _masks(structure)
    sparse = apply_blocks(model, BlockSelection(masks, block))
    gating = BlockGating(model, structure)
    gating.set({path: mask.double() for path, mask in masks.items()})
    with torch.no_grad():
        masked, written = model(**tiny_batch())[0], sparse(**tiny_batch())[0]
    gating.remove()
    assert masked.abs().max() > 1e-2
    assert float((masked - written).abs().max()) <= 1e-10
    assert any(isinstance(module, BlockLinear) for module in sparse.modules())
    counted = sparse.config.dsprune["parameters"]
    assert counted["total"] == sum(param.numel() for param in sparse.parameters())
    assert counted["encoder"] == int(structure.remaining(masks))
    areas = sum(param.count_nonzero() for name, param in sparse.named_parameters() if ".layer" in name)
    assert counted["encoder_nonzeros"] == areas


@pytest.mark.parametrize("block", BLOCKS)
def test_gate_gradient_is_the_taylor_sum_of_the_block(block):
    model = _compact()
    structure = analyze_blocks(model, block)
    gating = BlockGating(model, structure)
    gates = {
        path: torch.ones(grid, dtype=torch.float64).requires_grad_() for path, grid in structure.gate_shapes.items()
    }
    gating.set(gates)
    model(**tiny_batch())[0].square().sum().backward()
    for matrix in structure.matrices:
        weight = model.get_parameter(f"{matrix.path}.weight")
        taylor = weight.grad * weight.detach()
        for row in range(matrix.grid[0]):
            for column in range(matrix.grid[1]):
                rows, columns = block[0] * row, block[1] * column
                expected = taylor[rows : rows + block[0], columns : columns + block[1]].sum()
                torch.testing.assert_close(gates[matrix.path].grad[row, column], expected, rtol=1e-9, atol=1e-12)


def test_open_gates_change_nothing_and_come_off_without_a_trace():
    model = _compact()
    before = model(**tiny_batch())[0].detach()
    structure = analyze_blocks(model, (8, 8))
    gating = BlockGating(model, structure)
    assert torch.equal(model(**tiny_batch())[0], before)
    gating.set({path: torch.ones(grid, dtype=torch.float64) for path, grid in structure.gate_shapes.items()})
    torch.testing.assert_close(model(**tiny_batch())[0], before)
    with pytest.raises(ConfigError, match="needs the shape"):
        gating.set({path: torch.ones(1, 1) for path in structure.gate_shapes})
    gating.remove()
    assert torch.equal(model(**tiny_batch())[0], before)


def test_soft_counts_are_differentiable_and_every_block_has_a_price():
    structure = analyze_blocks(_compact(), (8, 8))
    gates = {path: torch.full(grid, 0.5).requires_grad_() for path, grid in structure.gate_shapes.items()}
    structure.remaining(gates).backward()
    assert all((gate.grad == 64).all() for gate in gates.values())


def test_magnitudes_are_the_norms_of_blocks():
    model = _compact()
    structure = analyze_blocks(model, (7, 5))
    norms = block_magnitudes(structure, model.get_parameter)
    matrix = structure.matrices[3]
    weight = model.get_parameter(f"{matrix.path}.weight").detach()
    assert norms[matrix.path].shape == matrix.grid
    assert float(norms[matrix.path][-1, -1]) == pytest.approx(
        float(weight[7 * (matrix.grid[0] - 1) :, 5 * (matrix.grid[1] - 1) :].norm())
    )


def test_a_block_sparse_folder_round_trips(tmp_path):
    model = _compact(dtype=torch.float32)
    masks = _masks(analyze_blocks(model, (8, 8)))
    sparse = apply_blocks(model, BlockSelection(masks, (8, 8)))
    sparse.save_pretrained(tmp_path)
    loaded = load_compact(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch())[0], sparse(**tiny_batch())[0])


def test_matrices_that_are_smaller_than_a_block_stay_dense():
    model = _compact()
    places = {matrix.place for matrix in analyze_blocks(model, (20, 20)).matrices if matrix.layer == 1}
    assert "attention.self.query" not in places  # two heads of eight are left
    assert "intermediate.dense" in places


def test_what_blocks_cannot_be_removed_from_is_refused():
    with pytest.raises(ArchitectureError, match="run a pruning method first"):
        analyze_blocks(tiny_model("bert"), (8, 8))
    with pytest.raises(ConfigError, match="no matrix of the compact model holds a block of 100 x 100"):
        analyze_blocks(_compact(), (100, 100))
    model = tiny_model("bert")
    gates = ones(analyze(model))
    gates["qk_dim"][0, 3:8] = 0
    ragged = apply_selection(model, Selection.from_gates(analyze(model), gates, empty="bias"))
    with pytest.raises(ArchitectureError, match="heads of unequal size"):
        analyze_blocks(ragged, (8, 8))


def test_selections_round_trip_and_are_told_apart(tmp_path):
    masks = _masks(analyze_blocks(_compact(), (8, 8)))
    BlockSelection(masks, (8, 8)).save(tmp_path / "blocks.safetensors")
    assert BlockSelection.is_at(tmp_path / "blocks.safetensors")
    loaded = BlockSelection.load(tmp_path / "blocks.safetensors")
    assert loaded.block == (8, 8)
    assert all(torch.equal(loaded.masks[path], mask) for path, mask in masks.items())
    structure = analyze(tiny_model("bert"))
    Selection.from_gates(structure, ones(structure)).save(tmp_path / "units.safetensors")
    assert not BlockSelection.is_at(tmp_path / "units.safetensors")
