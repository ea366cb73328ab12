"""Shapes: the same sizes in every layer, exactly those that were asked for, as a stock model that needs no dsprune."""

from __future__ import annotations

import json

import pytest
import torch

from dsprune.config import ShapeConfig, parse_config
from dsprune.consolidate import apply_selection, is_stock
from dsprune.errors import ConfigError
from dsprune.methods import method_class, method_options
from dsprune.methods.parts import gates_from
from dsprune.methods.size_constraints import SizeConstraints, aimed
from dsprune.structure import CostModel, Selection, analyze, attach_gates, budget_for, find_shape, shape_gates
from tests.helpers.models import batch_for, tiny_model
from tests.helpers.plans import plan_for
from tests.helpers.settings import ROWS

OPTIONS = {row.name: row.options for row in ROWS}
SHAPES = {
    "bert": {"ffn": 40, "layers": 1},
    "token": {"hidden": 24, "heads": 3, "ffn": 40, "layers": 1},
    "distilbert": {"ffn": 20},
    "gpt2": {"hidden": 16, "heads": 2, "ffn": 33},
    "llama": {"hidden": 22, "heads": 2, "ffn": 20, "layers": 1},
    "llama-biased": {"heads": 2, "ffn": 11},
    "mistral": {"hidden": 21, "heads": 2},
    "qwen2": {"hidden": 21, "ffn": 20, "heads": 2},
    "qwen3": {"hidden": 13, "layers": 1},
    "t5": {"ffn": 40},
    "flan-t5": {"hidden": 21, "ffn": 20},
}
POOLED = {
    "bert": {"hidden": 24, "heads": 3, "ffn": 40},
    "roberta": {"hidden": 24, "heads": 3, "layers": 1},
    "electra": {"hidden": 16, "heads": 2},
    "electra-projected": {"hidden": 24, "heads": 3},
    "distilbert": {"hidden": 24, "heads": 3, "ffn": 20},
    "deberta-v2": {"hidden": 24, "heads": 3},
    "deberta-v2-unshared": {"hidden": 24, "heads": 3, "layers": 1},
}
"""Shapes of fewer hidden dimensions for classifiers that read a pooler."""
RANKED = {
    "bert": {"ffn": 40},
    "llama": {"heads": 2, "ffn": 20},
    "qwen3": {"heads": 2},
    "gpt2": {"ffn": 10},
    "t5": {"ffn": 20},
}

LESS = {"t5": 0.25, "flan-t5": 0.3}
"""Targets where FFNs alone can shrink."""


def _method(name, model, shape, target=0.4, **options):
    structure = analyze(model)
    cls = method_class(name)
    if "uniform" not in shape:
        target = float(CostModel(structure, empty=cls.empty).sparsity(shape_gates(structure, shape)))
    plan = plan_for(structure, name, target, shape=ShapeConfig(**shape))
    method = cls(structure, cls.Options(**OPTIONS[name], **options), plan)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in method.parameters().values():
            if value.dim() > 0 and not value.eq(1).all():
                value.copy_(torch.randn(value.shape, generator=generator) * 2)
    return method


def _sizes(config, structure):
    names = structure.family.sizes
    ours = {"hidden": "hidden", "heads": "num_heads", "ffn": "ffn_dim", "layers": "num_layers"}
    return {name: getattr(config, names[ours[name]]) for name in ours}


def _export(method, model, folder):
    """The stock model that a method's selection becomes, loaded by transformers alone, after comparison."""
    selection = method.select()
    compact = apply_selection(model, selection)
    assert type(compact) is type(model)
    compact.save_pretrained(folder)
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert not (folder / "modeling_dsprune.py").exists()
    stock = type(model).from_pretrained(folder).eval()
    gating = attach_gates(model, method.structure, empty=method.empty)
    gating.set(selection.gates)
    with torch.no_grad():
        masked, ours = model(**batch_for(model))[0], stock(**batch_for(model))[0]
    gating.remove()
    torch.testing.assert_close(ours, masked, rtol=0, atol=1e-5)
    return stock, selection


@pytest.mark.parametrize("name", SHAPES)
def test_cofi_lands_on_a_shape(name, tmp_path):
    model = tiny_model(name)
    method = _method("cofi", model, SHAPES[name])
    stock, _ = _export(method, model, tmp_path)
    assert _sizes(stock.config, method.structure).items() >= SHAPES[name].items()


@pytest.mark.parametrize("name", POOLED)
def test_a_pooler_is_as_wide_as_a_stock_model(name, tmp_path):
    model = tiny_model(name)
    shape = POOLED[name]
    method = _method("cofi", model, shape)
    some = Selection.from_gates(method.structure, shape_gates(method.structure, shape), empty=method.empty)
    assert is_stock(model, some)
    stock, selection = _export(method, model, tmp_path)
    assert _sizes(stock.config, method.structure).items() >= shape.items()
    assert torch.equal(selection.gates["pooler"], selection.gates["hidden"])
    assert len(selection.kept(method.structure.pooler)) == shape["hidden"]
    counted = CostModel(method.structure).parameters(selection.hard(), of="total")
    assert sum(param.numel() for param in stock.parameters()) == int(counted)


def test_a_hidden_dimension_of_a_shape_learns_from_its_row_of_the_pooler():
    structure = analyze(tiny_model("bert"))
    method = _method("cofi", tiny_model("bert"), {"hidden": 24, "heads": 3})
    gates = method.gates(gates_from(method))
    assert set(gates) == {"head", "hidden", "pooler"} == set(method.kinds)
    method.learn(gates_from(method), gates, {"pooler": torch.ones(structure.sizes.pooler)})
    assert method.log_alpha["hidden"].grad.abs().sum() > 0
    assert "pooler" not in _method("cofi", tiny_model("bert"), {"ffn": 40}).kinds


@pytest.mark.parametrize("name", RANKED)
def test_grain_lands_on_a_shape(name, tmp_path):
    model = tiny_model(name)
    method = _method("grain", model, RANKED[name], units="heads")
    stock, selection = _export(method, model, tmp_path)
    assert _sizes(stock.config, method.structure).items() >= RANKED[name].items()
    best = method.importance["ffn_dim"].topk(int(selection.gates["ffn_dim"][0].sum()), -1).indices
    assert selection.gates["ffn_dim"].gather(1, best).all()


@pytest.mark.parametrize("method_name", ["cofi", "grain"])
@pytest.mark.parametrize("name", ["bert", "token", "gpt2", "llama", "qwen2", "qwen3", "t5", "flan-t5"])
def test_uniform_sizes_meet_the_target(name, method_name, tmp_path):
    model = tiny_model(name)
    options = {"units": "heads"} if method_name == "grain" else {}
    target = LESS.get(name, 0.4)
    method = _method(method_name, model, {"uniform": True}, target=target, **options)
    _, selection = _export(method, model, tmp_path)
    sparsity = method.budget.removed(selection.hard())
    neuron = 2 * float(method.budget.prices(("ffn_dim",))["ffn_dim"][0, 0]) / method.budget.dense
    assert (
        target - 1e-9 <= sparsity < target + max(0.005, neuron)
    )  # one neuron of every layer is all that is between two sizes


def test_grain_shrinks_every_layer_alike_on_the_way():
    method = _method("grain", tiny_model("llama"), {"uniform": True}, units="heads")
    before = 128
    for sparsity in (0.1, 0.3, 0.5):
        masks = method._pruned(sparsity)
        counts = masks["ffn_dim"].sum(-1)
        assert counts[0] == counts[1]
        assert counts[0] < before
        method.mask, before = masks, counts[0]


def test_one_gate_stands_for_a_layer():
    method = _method("cofi", tiny_model("bert"), {"layers": 1})
    gates = method.gates(gates_from(method))
    assert set(gates) == {"attn", "ffn"} == set(method.kinds)
    assert torch.equal(gates["attn"], gates["ffn"])
    method.learn(gates_from(method), gates, {kind: torch.ones(2) for kind in gates})
    assert method.log_alpha["layer"].grad.abs().sum() > 0


def test_constraints_by_hand():
    share = torch.tensor([0.9, 0.5], dtype=torch.float64, requires_grad=True)
    constraints = SizeConstraints({"ffn_dim": 2}, {"ffn_dim": 0.6})
    with torch.no_grad():
        constraints.multipliers["linear.ffn_dim"].copy_(torch.tensor([2.0, 3.0]))
        constraints.multipliers["quadratic.ffn_dim"].fill_(10.0)
    penalty = constraints.penalty({"ffn_dim": share}, 0.5)
    gaps = (0.8 - 0.9, 0.8 - 0.5)  # half way from 1 to 0.6
    assert float(penalty) == pytest.approx(2 * gaps[0] + 3 * gaps[1] + 10 * (gaps[0] ** 2 + gaps[1] ** 2))
    even = SizeConstraints({"ffn_dim": 2}, None)
    assert float(even.penalty({"ffn_dim": torch.tensor([0.7, 0.7])}, 1.0)) == 0


def test_the_nearest_shape_is_found():
    structure = analyze(tiny_model("llama"))
    wanted = {"hidden": 22 / 32, "heads": 0.5, "ffn": 30 / 64}
    target = budget_for(structure, 0).removed(shape_gates(structure, {"hidden": 22, "heads": 2, "ffn": 30}))
    assert find_shape(structure, budget_for(structure, target), wanted) == {"hidden": 22, "heads": 2, "ffn": 30}


@pytest.mark.parametrize(
    ("name", "method", "shape", "options", "message"),
    [
        ("bert", "cofi", {"ffn": 65}, {}, r"shape.ffn = 65: the dense model has 64"),
        ("base", "cofi", {"hidden": 24, "heads": 3}, {}, "pooler or head stay 32 wide, as in no stock model"),
        ("bert", "cofi", {"heads": 2}, {}, r"2 heads and hidden size 32: a stock 'bert' has heads of 8 dimensions"),
        ("bert", "cofi", {"ffn": 10}, {"gates": ["head"]}, r"shape.ffn = 10: the method has no gates of 'ffn_dim'"),
        ("bert", "cofi", {"uniform": True}, {"gates": ["head", "attn"]}, "none of method.gates has a size"),
        ("llama", "cofi", {"hidden": 21}, {}, "a stock 'llama' has a hidden size that the number of heads divides"),
        ("llama", "cofi", {"heads": 3}, {}, r"shape.heads = 3: heads go in groups of 2"),
        ("llama", "grain", {"ffn": 10}, {}, r'GRAIN needs method.units = "heads"'),
        ("llama", "grain", {"layers": 1}, {"units": "heads"}, r"shape.layers = 1: the method has no gates of"),
        ("llama", "grain", {"heads": 2}, {"units": "heads", "attention_density": 0.5}, "leave it out"),
        ("t5", "cofi", {"hidden": 16}, {}, "a stock 't5' scales its output by its own width"),
        ("flan-t5", "cofi", {"heads": 2}, {}, "a stock 't5' has 4 heads in every layer"),
        ("t5", "cofi", {"layers": 1}, {}, "shape.layers = 1: encoder and decoder have layers of their own"),
        ("llama", "mlpruning", {"uniform": True}, {}, "MLPruning finds a size for every layer"),
    ],
)
def test_what_cannot_be_is_refused(name, method, shape, options, message):
    with pytest.raises(ConfigError, match=message):
        _method(method, tiny_model(name), shape, **options)


def test_a_factored_embedding_is_refused():
    with pytest.raises(ConfigError, match="no stock class has a factored embedding"):
        _method("cofi", tiny_model("bert", embedding_rank=5), {"uniform": True})


def _config(**tables):
    tree = {"output": "x", "model": {"name": "m"}, "task": {"name": "sst2"}, **tables}
    return parse_config(tree, method_options)


def test_a_shape_says_what_the_target_is():
    structure = analyze(tiny_model("llama"))
    implied = float(CostModel(structure).sparsity(shape_gates(structure, {"ffn": 20})))
    shape = ShapeConfig(ffn=20)
    assert aimed(budget_for(structure, 0.95), structure, shape, is_set=False).target == implied
    assert aimed(budget_for(structure, implied), structure, shape, is_set=True).target == implied
    with pytest.raises(ConfigError, match=r"prune.target = 0.9 of the .* contradicts the sizes of \[shape\]"):
        aimed(budget_for(structure, 0.9), structure, shape, is_set=True)
    with pytest.raises(ConfigError, match="leave out one or the other"):
        _config(shape={"ffn": 20, "uniform": True})
