"""Losses over the vocabulary by chunks: equal to the plain computation, and never as large."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsprune.distill import TeacherStates, chunked_losses, top_logits

TOKENS, WIDTH, VOCABULARY = 23, 8, 31
SHARES = torch.tensor([0.7, 0.3], dtype=torch.float64)


def _problem(tokens=TOKENS, vocabulary=VOCABULARY, *, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [draw(tokens, WIDTH), draw(vocabulary, WIDTH), draw(vocabulary) if bias else None]
    teacher = TeacherStates(draw(tokens, 5), draw(vocabulary, 5), None)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    for tensor in student:
        if tensor is not None:
            tensor.requires_grad_()
    return student, teacher, labels


def _losses(teacher, labels, temperature=2.0):
    def losses(logits, rows):
        return torch.stack(
            [teacher.divergence(logits, rows, temperature), F.cross_entropy(logits, labels[rows], reduction="sum")]
        )

    return losses


def _plain(student, teacher, labels, temperature=2.0):
    logits = F.linear(*student)
    log_teacher = F.log_softmax(F.linear(teacher.hidden, teacher.weight) / temperature, -1)
    log_student = F.log_softmax(logits / temperature, -1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return torch.stack([divergence, F.cross_entropy(logits, labels, reduction="sum")])


def test_under_autocast_logits_are_bf16_and_losses_are_not():
    """Sums of losses over thousands of tokens, and the shares of the parts, would not survive bf16."""
    student, teacher, labels = _problem(dtype=torch.float32)
    shares = SHARES.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, parts = chunked_losses(*student, _losses(teacher, labels), shares, chunk=7)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in student]
    expected, exact = chunked_losses(*rounded, _losses(teacher, labels), shares, chunk=7)
    torch.testing.assert_close((total, parts), (expected, exact), rtol=1e-6, atol=0)
    got, wanted = (torch.autograd.grad(loss, leaves) for loss, leaves in ((total, student), (expected, rounded)))
    assert [grad.dtype for grad in got] == [torch.float32] * 3
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0.02, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
def test_chunks_give_the_plain_losses_and_gradients(chunk, bias):
    student, teacher, labels = _problem(bias=bias)
    learned = [tensor for tensor in student if tensor is not None]
    parts = _plain(student, teacher, labels)
    expected = torch.autograd.grad(parts @ SHARES / 5, learned)
    total, got = chunked_losses(*student, _losses(teacher, labels), SHARES, chunk=chunk)
    torch.testing.assert_close(got, parts.detach(), rtol=1e-13, atol=1e-13)
    assert not got.requires_grad
    for ours, theirs in zip(torch.autograd.grad(total / 5, learned), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_a_frozen_head_gets_no_gradient_and_its_input_the_same():
    student, teacher, labels = _problem()
    hidden, weight, bias = student
    expected = torch.autograd.grad(_plain(student, teacher, labels) @ SHARES, hidden)[0]
    total, _ = chunked_losses(*student, _losses(teacher, labels), SHARES, chunk=4, frozen=True)
    total.backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-13)
    assert weight.grad is None
    assert bias.grad is None


def test_no_token_at_all_is_no_loss_and_a_gradient_of_zero():
    student, teacher, labels = _problem(tokens=0)
    total, parts = chunked_losses(*student, _losses(teacher, labels), SHARES, chunk=4)
    total.backward()
    assert total.item() == 0.0
    assert parts.tolist() == [0.0, 0.0]
    assert float(student[1].grad.abs().max()) == 0.0


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("tokens", [64, 256, 1024])
@pytest.mark.parametrize("k", [None, 3])
def test_no_tensor_grows_with_tokens_times_vocabulary(tokens, k):
    """The largest is a chunk of logits, or the head itself, however many tokens there are."""
    vocabulary, chunk = 2000, 4
    student, teacher, labels = _problem(tokens, vocabulary, dtype=torch.float32)
    with _Largest() as largest:
        if k is not None:
            teacher = top_logits(teacher.hidden, teacher.weight, None, k=k, temperature=2.0, chunk=chunk)
        total, _ = chunked_losses(*student, _losses(teacher, labels), SHARES.float(), chunk=chunk)
        total.backward()
    assert largest.elements == vocabulary * WIDTH
    with _Largest() as largest:
        _plain(*_problem(tokens, vocabulary, dtype=torch.float32))
    assert largest.elements == tokens * vocabulary


def _by_hand(student, teacher, k, temperature):
    """KL between distributions over the k likeliest tokens and "another one", token by token."""
    ours, theirs = (torch.softmax(F.linear(x, w, b) / temperature, -1) for x, w, b in (student, teacher))
    total = 0.0
    for p, q in zip(theirs, ours, strict=True):
        best = p.topk(k).indices
        p_top, q_top = torch.cat([p[best], 1 - p[best].sum()[None]]), torch.cat([q[best], 1 - q[best].sum()[None]])
        total = total + (p_top * (p_top / q_top).log()).sum()
    return total


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
def test_top_k_is_the_divergence_over_k_tokens_and_the_rest(k):
    student, teacher, _ = _problem()
    top = top_logits(teacher.hidden, teacher.weight, None, k=k, temperature=2.0, chunk=4)
    total, _ = chunked_losses(
        *student, lambda logits, rows: top.divergence(logits, rows, 2.0)[None], SHARES.new_ones(1), chunk=4
    )
    expected = _by_hand(student, (teacher.hidden, teacher.weight, None), k, 2.0)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    whole = _plain(student, teacher, torch.zeros(TOKENS, dtype=torch.int64))[0]
    assert total.item() <= whole.item() + 1e-6
    for ours, theirs in zip(
        torch.autograd.grad(total, student[:2]), torch.autograd.grad(expected, student[:2]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_top_k_of_all_but_one_token_is_nearly_the_whole():
    student, teacher, labels = _problem()
    whole = _plain(student, teacher, labels)[0].item()
    top = top_logits(teacher.hidden, teacher.weight, None, k=VOCABULARY - 1, temperature=2.0, chunk=4)
    logits = F.linear(*student)
    assert top.divergence(logits, slice(0, TOKENS), 2.0).item() == pytest.approx(whole, rel=1e-5)


def test_bf16_sums_in_fp32():
    student, teacher, labels = _problem(tokens=400, dtype=torch.bfloat16)
    total, _ = chunked_losses(*student, _losses(teacher, labels), SHARES.float(), chunk=1)
    total.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in student]
    states = TeacherStates(teacher.hidden.double(), teacher.weight.double(), None)
    (_plain(exact, states, labels) @ SHARES).backward()
    for ours, theirs in zip(student, exact, strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert float(error) < 0.02
