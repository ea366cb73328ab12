"""What a unit is worth, and what a target is a share of, against counts of a whole model."""

import pytest
import torch

from dsprune.errors import ConfigError
from dsprune.structure import Budget, CostModel, analyze, analyze_blocks, block_budget, budget_for, gate_shapes, ones
from tests.helpers.models import ALL, tiny_model
from tests.helpers.training import without_some_units

COSTS = ("encoder", "total", "macs")


@pytest.mark.parametrize("of", COSTS)
@pytest.mark.parametrize("name", ALL)
def test_a_price_is_what_goes_with_the_unit(name, of):
    """In every family, of every kind: the exact difference that closing one gate makes, all else kept."""
    structure = analyze(tiny_model(name))
    budget = budget_for(structure, 0.5, of=of, empty="bias", length=12)
    prices = budget.prices(tuple(gate_shapes(structure.sizes)))
    for kind, price in prices.items():
        gate = ones(structure, (kind,), dtype=torch.float64)
        for place in {0, gate[kind].numel() // 2, gate[kind].numel() - 1}:
            one_less = gate[kind].clone()
            one_less.view(-1)[place] = 0
            gone = float(budget.spent({}) - budget.spent({kind: one_less}))
            # A group of a single unit takes more with it: that is a matter of the whole group.
            if structure.sizes.head_dim > 1 or kind not in ("vo_dim", "qk_dim"):
                assert float(price.view(-1)[place]) == gone, kind
        if of != "encoder" or kind != "pooler":
            assert (price > 0).all(), kind


def test_a_target_is_a_share_of_the_model_before_its_embedding_was_factored():
    factored, whole = (analyze(tiny_model("bert", embedding_rank=rank)) for rank in (8, None))
    for of in COSTS:
        before, after = budget_for(whole, 0.5, of=of), budget_for(factored, 0.5, of=of)
        assert before.dense == after.dense == float(before.spent({}))
        assert after.excess(0.5) == pytest.approx(0.5 * before.dense + float(after.spent({})) - before.dense)
    assert (
        float(budget_for(factored, 0, of="macs", length=10).spent({}))
        > budget_for(whole, 0, of="macs", length=10).dense
    )


def test_multiply_adds_are_those_of_the_length_that_is_said():
    structure = analyze(tiny_model("bert"))
    for length in (4, 64):
        budget = budget_for(structure, 0.5, of="macs", length=length)
        assert budget.dense == float(CostModel(structure).macs(ones(structure), length=length))
        assert budget.describe() == f"the multiply-adds at length {length}"


def test_any_differentiable_cost_of_gates_is_a_budget():
    """A table whose answer is known: a neuron costs 3, a head 5, and what is left of an empty model 10."""
    shapes = {"head": (2, 4), "ffn_dim": (2, 6)}

    def cost(gates):
        sums = {
            kind: gates[kind].double().sum() if kind in gates else torch.ones(shapes[kind]).sum() for kind in shapes
        }
        return 10 + 5 * sums["head"] + 3 * sums["ffn_dim"]

    budget = Budget(0.5, cost, 86.0, "milliseconds", shapes, "prune.speedup")
    prices = budget.prices(("head", "ffn_dim"))
    assert (prices["head"] == 5).all()
    assert (prices["ffn_dim"] == 3).all()
    assert budget.floor(("head", "ffn_dim")) == 10
    assert budget.floor(("head",)) == 46
    with pytest.raises(ConfigError, match=r"prune.speedup = 0.5 of milliseconds is out of reach: at most 0.4651"):
        budget.check(budget.floor(("head",)), "at most {}")
    gates = {"head": torch.full((2, 4), 0.25), "ffn_dim": torch.ones(2, 6)}
    assert float(budget.sparsity(gates)) == pytest.approx(30 / 86)
    assert budget.removed(gates) == 0.0


def test_blocks_cost_what_they_store():
    structure = analyze_blocks(without_some_units(tiny_model("bert")), (8, 8))
    budget = block_budget(structure, 0.5)
    assert float(budget.spent({})) == budget.dense == structure.parameters["encoder"]
    path = structure.matrices[0].path
    gate = torch.ones(structure.gate_shapes[path])
    gate[0, 0] = 0
    before = gate.clone()
    before[0, 1] = 0
    gone = float(budget.spent({path: gate}) - budget.spent({path: before}))
    assert float(budget.prices((path,))[path][0, 1]) == gone == 64
