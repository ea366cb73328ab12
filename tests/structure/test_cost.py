"""Invariant 3 in its differentiable part; the count of the exported model itself is tested in consolidate."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsprune.structure import CostModel, Selection, analyze, budget_for, compact_shape, is_removed, ones
from tests.helpers.models import ALL, DECODERS, ENCODER_DECODERS, FAMILIES, batch_for, tiny_model
from tests.helpers.selections import awkward_gates, random_gates


def _counted(structure, selection, *, encoder):
    return sum(
        int(torch.Size(compact_shape(param, selection)).numel())
        for param in structure.params.values()
        if not is_removed(param, selection) and (param.part == "encoder" or not encoder)
    )


@pytest.mark.parametrize("empty", ["identity", "bias"])
@pytest.mark.parametrize("name", ALL)
def test_hard_gates_cost_what_is_left(name, empty):
    structure = analyze(tiny_model(name))
    cost = CostModel(structure, empty=empty)
    cases = [gates for _, gates in awkward_gates(structure)] + [random_gates(structure, seed) for seed in range(5)]
    for gates in cases:
        selection = Selection.from_gates(structure, gates, empty=empty)
        for scope in ("encoder", "total"):
            assert int(cost.parameters(gates, of=scope)) == _counted(structure, selection, encoder=scope == "encoder")


def test_soft_gates_cost_the_mean_of_hard_samples():
    structure = analyze(tiny_model("bert"))
    cost = CostModel(structure)
    generator = torch.Generator().manual_seed(0)
    keep = {kind: 0.2 + 0.6 * torch.rand(gate.shape, generator=generator) for kind, gate in ones(structure).items()}
    samples = [
        float(cost.parameters({k: (torch.rand(p.shape, generator=generator) < p).float() for k, p in keep.items()}))
        for _ in range(4000)
    ]
    mean = sum(samples) / len(samples)
    assert float(cost.parameters(keep)) == pytest.approx(mean, rel=0.02)


def test_cost_is_differentiable_and_every_gate_has_a_price():
    structure = analyze(tiny_model("bert"))
    keep = {kind: (0.5 * gate).requires_grad_() for kind, gate in ones(structure).items()}
    CostModel(structure).sparsity(keep, of="total").backward()
    assert all((gate.grad < 0).all() for gate in keep.values())


@pytest.mark.parametrize(
    "name",
    [
        *FAMILIES,
        "token",
        "span",
        "deberta-token",
        "deberta-span",
        "deberta-base",
        *DECODERS,
        "qwen2-sequence",
        "gpt2-sequence",
        *ENCODER_DECODERS,
        "t5-encoder",
    ],
)
def test_multiply_adds_are_those_of_a_real_forward_pass(name):
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    batch = batch_for(model, batch=1, length=8)
    # With gradients: without, torch's counter trips over a view of a parameter that is handed to a linear.
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    structure = analyze(model)
    assert int(CostModel(structure).macs(ones(structure), length=8)) == counter.get_total_flops() // 2


def test_an_encoder_target_cannot_touch_embeddings():
    structure = analyze(tiny_model("bert"))
    encoder, total = (budget_for(structure, 0, of=of) for of in ("encoder", "total"))
    assert encoder.floor(("head", "ffn_dim")) == 0
    without_hidden = total.floor(("head", "ffn_dim"))
    assert without_hidden > total.floor(("head", "ffn_dim", "hidden")) > 0
    assert without_hidden == total.dense - encoder.dense
