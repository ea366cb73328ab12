from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsprune.tasks.losses import (
    ENDS,
    IGNORED,
    STARTS,
    cross_entropy,
    divergence,
    span_cross_entropy,
    span_divergence,
    squared_error,
)

PADDED = torch.tensor([[0, STARTS, ENDS, IGNORED], [STARTS | ENDS, 0, IGNORED, IGNORED]])
"""A feature of three tokens with an answer, and one of two tokens that points at its first."""


def kl(teacher: Tensor, student: Tensor, temperature: float) -> float:
    """By its definition, in float64."""
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    return float((p * (p / q).log()).sum()) * temperature**2


def test_cross_entropy_is_a_sum_over_targets() -> None:
    logits = torch.zeros(2, 3, 4)
    labels = torch.tensor([[IGNORED, 1, IGNORED], [3, 0, IGNORED]])
    assert cross_entropy(logits, labels).item() == pytest.approx(3 * math.log(4))
    assert cross_entropy(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)).item() == pytest.approx(5 * math.log(2))


def test_a_batch_without_targets_costs_nothing() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.full((2, 3), IGNORED)
    total = cross_entropy(logits, labels) + divergence(logits[labels != IGNORED], torch.zeros(0, 4), temperature=2.0)
    total.backward()
    assert total.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_squared_error_is_a_sum() -> None:
    assert squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])).item() == pytest.approx(5.0)


def test_divergence_by_its_definition() -> None:
    student, teacher = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = kl(teacher, student, 3.0)
    assert divergence(student, teacher, temperature=3.0).item() == pytest.approx(expected, rel=1e-5)
    assert divergence(student, student, temperature=3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_span_cross_entropy_by_hand() -> None:
    outputs = torch.zeros(2, 4, 2)
    assert span_cross_entropy(outputs, PADDED).item() == pytest.approx(math.log(3) + math.log(2))
    outputs[0, 1, 0] = 100.0  # the right start, and an even chance of each end
    assert span_cross_entropy(outputs, PADDED).item() == pytest.approx(math.log(3) / 2 + math.log(2))
    outputs[0, 2, 1] = 100.0
    assert span_cross_entropy(outputs, PADDED).item() == pytest.approx(math.log(2))
    outputs[1, 0] = 100.0  # both start and end at the first token
    assert span_cross_entropy(outputs, PADDED).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_span_divergence_adds_start_and_end_over_real_tokens(temperature: float) -> None:
    student, teacher = torch.randn(2, 2, 4, 2, generator=torch.Generator().manual_seed(1))
    expected = sum(
        kl(teacher[feature, :length, side], student[feature, :length, side], temperature)
        for feature, length in enumerate((3, 2))
        for side in (0, 1)
    )
    assert span_divergence(student, teacher, PADDED, temperature=temperature).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_padding_has_no_say_in_span_losses() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(2, 4, 2, generator=generator)
    student = torch.randn(2, 4, 2, generator=generator, requires_grad=True)
    louder = torch.where((PADDED == IGNORED)[..., None], 1e4, student.detach()).requires_grad_()
    gradients = []
    for outputs in (student, louder):
        total = span_cross_entropy(outputs, PADDED) + span_divergence(outputs, teacher, PADDED, temperature=2.0)
        gradients.append(torch.autograd.grad(total, outputs)[0])
    assert torch.equal(*gradients)
    assert (gradients[0][PADDED == IGNORED] == 0).all()
    assert gradients[0].isfinite().all()
    assert (gradients[0][PADDED != IGNORED] != 0).all()


def test_half_precision_outputs_lose_nothing_in_the_sum() -> None:
    outputs = torch.zeros(700, 4, 2, dtype=torch.bfloat16)
    labels = PADDED[:1].expand(700, -1)
    assert span_cross_entropy(outputs, labels).item() == pytest.approx(700 * math.log(3), rel=1e-5)
