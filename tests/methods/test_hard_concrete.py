import math

import pytest
import torch

from dsprune.methods.hard_concrete import (
    LOG_ALPHA_MAX,
    LOG_ALPHA_MIN,
    deterministic_gate,
    keep_probability,
    sample_gate,
)


def test_samples_hit_zero_as_often_as_the_formula_says():
    log_alpha = torch.linspace(LOG_ALPHA_MIN, LOG_ALPHA_MAX, 7).repeat(40_000, 1)
    gates = sample_gate(log_alpha, torch.rand(log_alpha.shape))
    frequency = (gates != 0).double().mean(0)
    torch.testing.assert_close(frequency, keep_probability(log_alpha[0]).double(), atol=0.01, rtol=0)
    assert gates.min() == 0.0
    assert gates.max() == 1.0


def test_keep_probability_is_the_closed_form():
    shift = (2 / 3) * math.log(0.1 / 1.1)
    for value in (-4.0, 0.0, 3.0):
        expected = 1 / (1 + math.exp(-(value - shift)))
        assert math.isclose(float(keep_probability(torch.tensor(value, dtype=torch.float64))), expected)


def test_samples_are_differentiable_where_they_are_not_clipped():
    log_alpha = torch.zeros(1000, requires_grad=True)
    gates = sample_gate(log_alpha, torch.rand(1000))
    gates.sum().backward()
    inside = (gates > 0) & (gates < 1)
    assert (log_alpha.grad[inside] > 0).all()
    assert not log_alpha.grad[~inside].any()


def test_deterministic_gates_keep_the_likeliest():
    log_alpha = torch.tensor([[0.0, 3.0, -1.0, 1.0], [4.0, 4.0, 4.0, -4.0]])
    gates = deterministic_gate(log_alpha, torch.tensor([2, 1]))
    assert (gates != 0).tolist() == [[False, True, False, True], [True, False, False, False]]
    torch.testing.assert_close(gates[0, 1], torch.sigmoid(torch.tensor(1.2 * 3.0)))


@pytest.mark.parametrize("temperature", [0.3, 2 / 3, 1.5])
def test_the_temperature_is_that_of_the_authors_code(temperature):
    """`L0Module`: `quantile_concrete`, `cdf_qz` and `_deterministic_z`, written out."""
    low, high, eps = -0.1, 1.1, 1e-6
    loga = torch.linspace(-4, 4, 9, dtype=torch.float64)
    u = torch.rand(9, dtype=torch.float64).clamp(eps, 1 - eps)
    y = torch.sigmoid((torch.log(u) - torch.log(1 - u) + loga) / temperature)
    z = torch.nn.functional.hardtanh(y * (high - low) + low, 0, 1)
    torch.testing.assert_close(sample_gate(loga, u, temperature), z)
    xn = (0 - low) / (high - low)
    cdf = torch.sigmoid((math.log(xn) - math.log(1 - xn)) * temperature - loga)
    torch.testing.assert_close(keep_probability(loga, temperature), 1 - cdf)
    soft = torch.sigmoid(loga / temperature * 0.8)
    torch.testing.assert_close(deterministic_gate(loga, torch.tensor(9), temperature), soft)
