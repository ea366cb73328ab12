"""Every cell of the table of families and methods: what it claims is run, what it denies is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsprune.arch import list_families, load_family
from dsprune.consolidate import apply_blocks, apply_selection
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.methods.parts import gates_from
from dsprune.methods.support import VARIANTS, families_table, refusal
from dsprune.structure import (
    analyze,
    analyze_blocks,
    attach_gates,
    ones,
)
from tests.helpers.models import DECODERS, ENCODER_DECODERS, FAMILIES, batch_for, tiny_model
from tests.helpers.settings import ROWS
from tests.helpers.training import block_pruning, pruning, without_some_units

OPTIONS = {row.name: row.options for row in ROWS}
TARGET = 0.4


def _prune(variant, model, batch):
    """A method after one step on real gate gradients: its selection, and the sparsity that it counts."""
    options = {**OPTIONS[variant.method], **variant.options}
    method, gating = pruning(variant.method, options, TARGET, model)
    begin = gates_from(method)
    gates = method.gates(begin)
    leaves = {kind: gate.detach().clone().requires_grad_() for kind, gate in gates.items()}
    gating.set(leaves)
    model(**batch)[0].square().sum().backward()
    method.learn(begin, gates, {kind: leaf.grad for kind, leaf in leaves.items()})
    gating.remove()
    selection = method.select()
    return selection, method.budget.removed(selection.hard()), _largest_unit(method)


def _largest_unit(method):
    """Share of the parameters that goes with a head, where heads are ranked by themselves, or with a neuron."""
    gate = ones(method.structure, ("head" if method.kinds == ("head", "ffn_dim") else "ffn_dim",))
    for value in gate.values():
        value[0, 0] = 0
    return method.budget.removed(gate)


def _check_method(variant, model):
    batch = batch_for(model)
    selection, sparsity, unit = _prune(variant, model, batch)
    assert sparsity == pytest.approx(TARGET, abs=max(unit, 0.01))
    compact = apply_selection(model, selection)
    gating = attach_gates(model, analyze(model), empty=selection.empty)
    gating.set(selection.gates)
    with torch.no_grad():
        torch.testing.assert_close(compact(**batch)[0], model(**batch)[0], rtol=0, atol=1e-5)


def _check_blocks(model):
    compact = without_some_units(model)
    method, gating = block_pruning({}, TARGET, compact)
    selection = method.select()
    gating.set(selection.masks)
    with torch.no_grad():
        batch = batch_for(model)
        masked = compact(**batch)[0]
        torch.testing.assert_close(apply_blocks(compact, selection)(**batch)[0], masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.title)
@pytest.mark.parametrize("name", list_families())
def test_a_cell_says_what_happens(name, variant):
    model = tiny_model(name)
    reason = refusal(variant, load_family(name))
    if reason is None:
        _check_blocks(model) if variant.method is None else _check_method(variant, model)
    elif variant.method is None:
        with pytest.raises(ArchitectureError, match="cannot lose blocks"):
            analyze_blocks(without_some_units(model), (8, 8))
    else:
        with pytest.raises(ConfigError, match="cannot lose units of"):
            _prune(variant, model, batch_for(model))


def test_every_family_has_a_tiny_model():
    assert set(list_families()) <= set(FAMILIES) | set(DECODERS) | set(ENCODER_DECODERS)


def test_the_table_has_a_row_for_every_family_and_a_reason_for_every_gap():
    table, notes = families_table().split("\n\n")
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == list_families()
    assert all(f"({i})" in table for i in range(1, 1 + len(notes.splitlines())))
    assert "no (1)" in table


def test_the_docs_show_the_table_that_the_code_gives():
    readme = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert families_table().strip() in readme
