"""MLPruning against its formulas, and against the pitfalls of its authors' code."""

import math

import pytest
import torch

from dsprune.errors import ConfigError
from dsprune.methods import method_class
from dsprune.methods.schedules import warmup_and_decay
from dsprune.methods.topk import count_kept, top_k
from dsprune.structure import CostModel, analyze, attach_gates, ones, unit_magnitudes
from tests.helpers.models import tiny_model
from tests.helpers.plans import plan_for
from tests.helpers.training import block_pruning, without_some_units

MLPruning = method_class("mlpruning")


def _method(*, target=0.5, of="encoder", total=200, **options):
    options = {"lr": 0.1, "init": 4.0, "penalty": 2000.0, **options}
    structure = analyze(tiny_model("bert"))
    plan = plan_for(structure, "mlpruning", target, of=of, total=total, per_epoch=10)
    return MLPruning(structure, MLPruning.Options(**options), plan)


def _magnitudes(method):
    model = tiny_model("bert")
    return unit_magnitudes(method.structure, lambda name: model.get_parameter(name))


def _unread(name):
    raise AssertionError(f"{name} was read for nothing")


def _train(method, steps, pull=0.0):
    """Steps under the regularisation and a task that pulls every gate by `pull`."""
    for step in range(steps):
        gates = method.gates(step)
        method.learn(step, gates, {kind: torch.full_like(gate, pull) for kind, gate in gates.items()})
        for optimizer in method.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_the_highest_scores_are_kept_and_at_least_one():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3]] * 3)
    theta = torch.tensor([0.0, -30.0, 30.0])
    assert count_kept(theta, 4).tolist() == [2, 1, 4]
    assert top_k(scores, theta).tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]]
    # ceil(sigmoid(10) * n) is all of a small group
    assert count_kept(torch.tensor([10.0]), 768).tolist() == [768]


def test_gradients_go_straight_through():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3]], requires_grad=True)
    theta = torch.zeros(1, requires_grad=True)
    (top_k(scores, theta) * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert scores.grad.tolist() == [[1, 2, 3, 4]]
    assert theta.grad.tolist() == [5]  # 2 + 3, the kept ones


def test_scores_start_from_the_magnitude_of_weights():
    """Pitfall 9: with equal scores the first units to go are arbitrary."""
    method = _method()
    magnitudes = _magnitudes(method)
    method.begin(tiny_model("bert").get_parameter)
    for kind, score in method.groups.score.items():
        assert torch.equal(score.argsort(-1), magnitudes[kind].float().argsort(-1)), kind
        torch.testing.assert_close(score.detach().std(-1, correction=0), torch.ones(2))
    zero = _method(scores="zero")
    zero.begin(_unread)
    assert not any(score.any() for score in zero.groups.score.values())
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[1]
    dense, output = layer.intermediate.dense, layer.output.dense
    expected = dense.weight[7].square().sum() + dense.bias[7] ** 2 + output.weight[:, 7].square().sum()
    assert float(magnitudes["ffn_dim"][1, 7]) == pytest.approx(float(expected.sqrt().detach()))


def test_remaining_is_the_share_at_the_fractional_sizes():
    method = _method()
    with torch.no_grad():
        for theta in method.groups.theta.values():
            theta.zero_()
    dense = CostModel(method.structure).dense("encoder")
    # Half of every group: heads, neurons and rows. Written out for one layer of 32 and 64.
    attention = 3 * (16 * 32 + 16) + 16 * 16 + 16
    ffn = 32 * 32 + 32 + 16 * 32 + 16
    norms = 4 * 32
    assert float(method.remaining().detach()) == pytest.approx(2 * (attention + ffn + norms) / dense)


def test_the_weight_of_the_regularisation_follows_the_gap():
    method = _method(penalty=20000.0, target=0.5)
    gap = float(method.remaining().detach()) - 0.5
    weight = 20000 * gap**2 / 0.25
    assert float(method.penalty(0).detach()) == pytest.approx(weight * gap**2, rel=1e-6)


@pytest.mark.parametrize(("two_sided", "returns"), [(True, True), (False, False)])
def test_only_the_two_sided_rule_pulls_sizes_back_up(two_sided, returns):
    """Pitfall 7: one-sided, sizes that fell below the target stay there."""
    method = _method(two_sided=two_sided, target=0.3)
    with torch.no_grad():
        for theta in method.groups.theta.values():
            theta.fill_(-1.0)
    before = float(method.remaining().detach())
    assert before < 0.7
    _train(method, 60)
    assert (float(method.remaining().detach()) > before + 0.05) is returns


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_the_exported_model_lands_on_the_target(target):
    method = _method(target=target)
    method.begin(tiny_model("bert").get_parameter)
    _train(method, 200)
    sparsity = float(CostModel(method.structure, empty="bias").sparsity(method.select().gates))
    assert target <= sparsity < target + 0.005
    # Four heads a layer are coarse; the thresholds themselves have come near.
    assert method.metrics(200)["sparsity/expected"] == pytest.approx(target, abs=0.03)


def test_every_group_keeps_a_unit_and_a_target_beyond_that_is_refused():
    with pytest.raises(ConfigError, match=r"keeps a unit of every group .* 0\.88\d+ at most"):
        _method(target=0.98)
    method = _method(target=0.85)
    for kind, mask in method.groups.hard_gates(-100).items():
        assert (mask.sum(-1) == 1).all(), kind


def test_the_learning_rate_of_scores_rises_and_falls():
    rates = [warmup_and_decay(step, total=10, warmup=0.2) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == 0.0
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_unknown_gates_are_refused():
    with pytest.raises(ConfigError, match="unknown \\['hidden'\\]"):
        _method(gates=("hidden",))


@pytest.mark.parametrize(("scores", "scale", "bound"), [("uniform", 0.2, 0.2), ("kaiming", 0.2, 1.0)])
def test_scores_may_start_as_in_the_authors_code(scores, scale, bound):
    """`MaskedLinear.init_mask`: uniform on (-scale, scale); kaiming with a = sqrt(5) on scores of shape [units, 1]."""
    literal = torch.empty(20000, 1)
    torch.nn.init.kaiming_uniform_(literal, a=math.sqrt(5))
    assert literal.abs().max() == pytest.approx(1.0, abs=1e-3)
    method, again = (_method(scores=scores, scores_scale=scale) for _ in range(2))
    method.begin(_unread)
    for kind, score in method.groups.score.items():
        assert torch.equal(score, again.groups.score[kind])
        assert bool((score.abs() <= bound).all())
    drawn = method.groups.score["ffn_dim"].detach()
    assert drawn.abs().max() > 0.9 * bound
    assert abs(float(drawn.mean())) < 0.2 * bound
    blocks = block_pruning(
        {"scores": scores, "scores_scale": scale}, 0.5, without_some_units(tiny_model("bert")), total=200
    )
    blocks[0].begin(_unread)
    assert all(0 < value.abs().max() <= bound for value in blocks[0].groups.score.values())


def test_the_gate_of_a_neuron_stands_after_the_activation_and_its_gradient_says_so():
    """Declared at the top of the method: the authors mask rows of the first FFN matrix, before it."""
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[0]
    linear, activation = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
    mask = torch.ones(64)
    mask[::3] = 0
    x = torch.randn(7, 32)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    ours, theirs = mask.clone().requires_grad_(), mask.clone().requires_grad_()
    after = activation(x @ weight.t() + bias) * ours
    before = activation(x @ (weight * theirs[:, None]).t() + bias * theirs)
    torch.testing.assert_close(after, before)
    direction = torch.randn(7, 64)
    (after * direction).sum().backward()
    (before * direction).sum().backward()
    gating = attach_gates(model, analyze(model), empty="bias")
    gate = ones(analyze(model), ("ffn_dim",))
    gate["ffn_dim"][0] = mask
    gate["ffn_dim"].requires_grad_()
    gating.set(gate)
    inner = x @ weight.t() + bias
    output = layer.output.dense(activation(inner))
    grad = torch.autograd.grad(output.sum(), gate["ffn_dim"])[0][0]
    through = layer.output.dense.weight.sum(0).detach()
    torch.testing.assert_close(grad, (activation(inner) * through).sum(0).detach(), rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(ours.grad, theirs.grad, dim=0)
    assert cosine < 0.99
