"""Invariant 1 of the design, and that open gates change nothing."""

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from dsprune.errors import ArchitectureError, ConfigError
from dsprune.structure import CostModel, analyze, attach_gates, gate_shapes, ones
from tests.helpers.models import ALL, SIZES, batch_for, tiny_batch, tiny_model


def _output(model, batch):
    return model(**batch)[0]


def _taylor(model, structure):
    """sum(grad * weight) over the weights of each unit, from the definition of who owns what."""
    sums = {k: torch.zeros(s, dtype=torch.float64) for k, s in gate_shapes(structure.sizes).items()}
    for param in structure.params.values():
        tensor = model.get_parameter(param.name)
        if tensor.grad is None:
            continue
        score = tensor.grad * tensor.detach()
        for i, axis in enumerate(param.axes):
            per_entry = score.movedim(i, 0).flatten(1).sum(1) if score.dim() > 1 else score
            for segment, part in zip(axis, per_entry.split([s.extent for s in axis]), strict=True):
                if segment.space is not None and segment.gated:
                    place = sums[segment.space.kind]
                    (place if segment.space.index is None else place[segment.space.index]).add_(segment.gather(part))
        if param.sublayer is not None and param.name.startswith(f"{param.sublayer.output}."):
            sums[param.sublayer.kind][param.sublayer.index] += score.sum()
    sums["hidden"] += sums["attn_row"].sum(0) + sums["ffn_row"].sum(0)
    sums["head"] = sums["vo_dim"].unflatten(-1, (structure.sizes.num_groups, -1)).sum(-1)
    return sums


@pytest.mark.parametrize("name", ALL)
def test_gate_gradient_is_the_taylor_sum(name):
    model = tiny_model(name, dtype=torch.float64)
    structure = analyze(model)
    gating = attach_gates(model, structure)
    gates = {kind: gate.requires_grad_() for kind, gate in ones(structure, dtype=torch.float64).items()}
    gating.set(gates)
    _output(model, batch_for(model)).square().sum().backward()
    for kind, expected in _taylor(model, structure).items():
        assert expected.abs().max() > 1e-5, f"{kind}: nothing to compare"
        torch.testing.assert_close(gates[kind].grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_open_gates_change_nothing_and_come_off_without_a_trace(name):
    model = tiny_model(name)
    batch = batch_for(model)
    before = _output(model, batch)
    gating = attach_gates(model, analyze(model))
    assert torch.equal(_output(model, batch), before)
    gating.set(ones(gating.structure))
    torch.testing.assert_close(_output(model, batch), before, rtol=1e-5, atol=1e-5)
    gating.set(None)
    assert torch.equal(_output(model, batch), before)
    gating.remove()
    assert torch.equal(_output(model, batch), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_dead_gates_get_no_gradient_through_hard_zeros():
    """A sublayer that is off contributes nothing, whatever its weights."""
    model = tiny_model("bert")
    structure = analyze(model)
    gating = attach_gates(model, structure)
    gates = ones(structure)
    gates["attn"][0] = 0
    gating.set(gates)
    before = _output(model, tiny_batch())
    torch.nn.init.normal_(model.bert.encoder.layer[0].attention.self.value.weight, std=5.0)
    assert torch.equal(_output(model, tiny_batch()), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_checkpointing_gives_the_same_gate_gradients(checkpointing):
    model = tiny_model("bert", dtype=torch.float64)
    structure = analyze(model)
    gating = attach_gates(model, structure)
    grads = []
    for enabled in (False, checkpointing):
        if enabled:
            model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        gates = {kind: gate.requires_grad_() for kind, gate in ones(structure, dtype=torch.float64).items()}
        gating.set(gates)
        _output(model, tiny_batch()).square().sum().backward()
        grads.append(gates)
    for kind in grads[0]:
        torch.testing.assert_close(grads[0][kind].grad, grads[1][kind].grad)


@pytest.mark.parametrize(
    ("gates", "message"),
    [({"heads": torch.ones(2, 4)}, "unknown gate 'heads'"), ({"head": torch.ones(3, 4)}, "this model needs")],
)
def test_wrong_gates_are_refused(gates, message):
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match=message):
        attach_gates(model, analyze(model)).set(gates)


def test_a_parameter_without_a_place_is_an_error_that_names_it():
    model = tiny_model("bert")
    model.bert.encoder.layer[1].register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ArchitectureError, match=r"no place in the spec for bert\.encoder\.layer\.1\.extra"):
        analyze(model)


def test_a_renamed_module_is_an_error_that_names_it():
    model = tiny_model("bert")
    output = model.bert.encoder.layer[0].output
    output.projection = output.dense
    del output.dense
    with pytest.raises(ArchitectureError, match=r"layer\.0\.output\.projection"):
        analyze(model)


def test_an_unknown_family_is_an_error():
    model = tiny_model("bert")
    model.config.model_type = "mamba"
    with pytest.raises(ArchitectureError, match="model type 'mamba' is not supported"):
        analyze(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size = 3 is not supported"),
        ({"pooler_hidden_size": 48}, r"pooler\.dense\.weight has shape \[48, 48\]"),
        ({"attention_head_size": 16}, r"query_proj\.weight has shape \[64, 32\]"),
    ],
)
def test_what_a_configuration_asks_for_beyond_the_spec_is_an_error(options, message):
    with torch.device("meta"):
        model = DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **options))
    with pytest.raises(ArchitectureError, match=message):
        analyze(model)


@pytest.mark.parametrize("name", ALL)
def test_structure_accounts_for_every_parameter(name):
    model = tiny_model(name)
    structure = analyze(model)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {n: p.shape for n, p in structure.params.items()}
    assert CostModel(structure).dense("total") == sum(p.numel() for p in model.parameters())
