"""CoFi against its formulas, and against the pitfalls of its authors' code."""

import math

import pytest
import torch

from dsprune.errors import ConfigError
from dsprune.methods import load_state, method_class, state_of
from dsprune.methods.hard_concrete import LOG_ALPHA_MAX, LOG_ALPHA_MIN, keep_probability
from dsprune.methods.lagrangian import lagrangian
from dsprune.methods.schedules import linear_target
from dsprune.structure import analyze
from tests.helpers.models import tiny_model
from tests.helpers.plans import plan_for

CoFi = method_class("cofi")


def _cofi(*, target=0.6, of="encoder", total=400, seed=0, **options):
    options = {"distill_phase": "0 steps", "warmup": "50 steps", "lr": 0.05, **options}
    if options.setdefault("constraint", "ascent") == "ascent":
        options.setdefault("multiplier_lr", 0.05)
    structure = analyze(tiny_model("bert"))
    plan = plan_for(structure, "cofi", target, of=of, total=total, per_epoch=10, seed=seed)
    return CoFi(structure, CoFi.Options(**options), plan)


def _train(method, steps):
    """Pull every gate by a fixed random amount, as a task loss would."""
    generator = torch.Generator().manual_seed(1)
    pull = {k: 1e-3 * torch.randn(v.shape, generator=generator) for k, v in method.log_alpha.items()}
    for step in range(steps):
        gates = method.gates(step)
        loss = sum((gates[kind] * pull[kind]).sum() for kind in gates) + method.penalty(step)
        loss.backward()
        for optimizer in method.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        method.after_step()


def test_all_gates_begin_open():
    """Pitfall 5: the code starts FFN neurons half closed."""
    method = _cofi()
    for log_alpha in method.log_alpha.values():
        assert keep_probability(log_alpha).min() > 0.99
    assert float(method.expected_sparsity().detach()) < 0.02


def test_the_distillation_phase_is_as_long_as_asked():
    """Pitfall 1: the code switches pruning on at step 100, whatever the options say."""
    method = _cofi(distill_phase="7 epochs", total=400)
    assert method.gates_from == 70
    assert method.gates(69) is None
    assert method.penalty(69) is None
    assert method.evaluation_gates(69) is None
    assert method.gates(70) is not None
    assert method.target_at(70) == 0.0
    assert method.target_at(95) == pytest.approx(0.3)
    assert method.target_at(300) == 0.6


def test_one_sample_per_step_everywhere():
    """Pitfall 13: noise comes from (seed, step), not from a process's generator."""
    one, other = _cofi(), _cofi()
    torch.manual_seed(1)
    first = one.gates(3)
    torch.manual_seed(2)
    second = other.gates(3)
    assert all(torch.equal(first[kind], second[kind]) for kind in first)
    assert not torch.equal(first["ffn_dim"], one.gates(4)["ffn_dim"])
    assert not torch.equal(first["ffn_dim"], _cofi(seed=1).gates(3)["ffn_dim"])


def test_multipliers_ascend_and_log_alphas_are_clamped():
    method = _cofi()
    _train(method, 5)
    assert float(method.multipliers["quadratic"].detach()) > 0
    with torch.no_grad():
        method.log_alpha["head"].fill_(100.0)
    method.after_step()
    assert float(method.log_alpha["head"].detach().max()) == pytest.approx(LOG_ALPHA_MAX)
    assert method.log_alpha["head"].min() >= LOG_ALPHA_MIN


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("of", ["encoder", "total"])
def test_the_selection_lands_on_the_target(target, of):
    """Invariant 7 and pitfall 12: what counts is the exported model, not the expectation."""
    target = target if of == "encoder" else target * 0.8
    method = _cofi(target=target, of=of)
    _train(method, 400)
    selection = method.select()
    landed = method.budget.removed(selection.hard())
    # The tiny model's hidden dimensions are 3% of it each, so half a point is not always to be had.
    largest_unit = 1 / 32
    assert target - 1e-9 <= landed <= target + largest_unit


def test_deterministic_gates_keep_the_expected_number():
    method = _cofi()
    _train(method, 100)
    gates = method.hard_gates()
    for kind in ("head", "ffn_dim", "hidden"):
        expected = keep_probability(method.log_alpha[kind].double()).sum(-1).round()
        assert torch.equal((gates[kind] != 0).sum(-1).double(), expected)
    for kind in ("attn", "ffn"):
        assert torch.equal(gates[kind] != 0, keep_probability(method.log_alpha[kind]) >= 0.5)


def test_the_temperature_reaches_samples_expectation_and_choice():
    method, usual = _cofi(temperature=0.3, init=0.0), _cofi(init=0.0)
    counts = [sum(float(((g > 0) & (g < 1)).sum()) for g in m.gates(3).values()) for m in (method, usual)]
    assert counts[0] < counts[1]
    alpha = method.log_alpha["ffn_dim"].detach()
    expected = torch.sigmoid(alpha - 0.3 * math.log(0.1 / 1.1))
    torch.testing.assert_close(method._expected_shares()["ffn_dim"].detach(), expected.double().mean(-1))
    kept = method.hard_gates(10.0)["ffn_dim"]
    torch.testing.assert_close(kept, torch.sigmoid(0.8 * alpha / 0.3))


def test_state_survives_a_round_trip():
    method = _cofi()
    _train(method, 20)
    other = _cofi(seed=5)
    load_state(other, state_of(method))
    assert all(torch.equal(value, other.parameters()[name]) for name, value in method.parameters().items())


def test_lagrangian_formula():
    s, linear, quadratic = torch.tensor(0.4), torch.tensor(-2.0), torch.tensor(3.0)
    assert float(lagrangian(s, 0.6, linear, quadratic)) == pytest.approx(-2.0 * -0.2 + 3.0 * 0.04)
    assert linear_target(5, target=0.8, warmup_steps=0) == 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.9, "of": "total", "gates": ("head", "ffn_dim")}, "out of reach: .* at most 0.8"),
        ({"gates": ("heads",)}, "unknown"),
        ({"distill_phase": "30 epochs", "warmup": "10 epochs"}, "leave no step"),
        ({"constraint": "project", "multiplier_lr": 0.1}, r'method.multiplier_lr is for method.constraint = "ascent"'),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        _cofi(**options)


def test_unknown_method_suggests_a_known_one():
    with pytest.raises(ConfigError, match="did you mean 'cofi'"):
        method_class("coffee")
