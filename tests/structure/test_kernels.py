from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from dsprune.structure.kernels import block_gated_linear, gated_linear, live_layer_norm


def _args(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("with_bias", [True, False])
def test_gated_linear_is_a_linear_with_scaled_rows_and_columns(with_bias):
    x, weight, bias, rows, columns = _args((2, 3, 5), (4, 5), (4,), (4,), (5,))
    bias = bias if with_bias else None
    expected = torch.nn.functional.linear(x * columns, weight, bias) * rows
    torch.testing.assert_close(gated_linear(x, weight, bias, rows, columns), expected)
    inputs = (x, weight, bias, rows, columns) if with_bias else (x, weight, rows, columns)
    call = gated_linear if with_bias else (lambda x, w, r, c: gated_linear(x, w, None, r, c))
    assert gradcheck(call, inputs)


def test_live_layer_norm_gradients():
    x, weight, bias, gate = _args((3, 6), (6,), (6,), (6,))
    alive = torch.tensor(True)
    assert gradcheck(lambda *a: live_layer_norm(*a, alive, 1e-5), (x, weight, bias, gate))


def test_live_layer_norm_is_the_norm_of_the_narrow_model():
    x, weight, bias, gate = _args((3, 6), (6,), (6,), (6,))
    live = torch.tensor([True, False, True, True, False, True])
    gate = (gate * live).detach()
    out = live_layer_norm(x * live, weight, bias, gate, torch.tensor(True), 1e-5)
    narrow = torch.nn.functional.layer_norm(x[:, live], (4,), weight[live], bias[live], 1e-5) * gate[live]
    torch.testing.assert_close(out[:, live], narrow)
    assert not out[:, ~live].any()


def test_a_dead_sublayer_passes_the_residual_and_its_gradient_untouched():
    x, weight, bias, gate = _args((3, 6), (6,), (6,), (6,))
    out = live_layer_norm(x, weight, bias, gate, torch.tensor(False), 1e-5)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_gate_gradients_of_half_precision_weights_are_formed_in_fp32():
    """A sum over a unit's weights may exceed what half precision holds."""
    x = torch.full((64, 300), 8.0, dtype=torch.float16)
    weight = torch.full((4, 300), 0.25, dtype=torch.float16)
    rows = torch.ones(4, requires_grad=True)
    columns = torch.ones(300, requires_grad=True)
    out = gated_linear(x, weight, None, rows, columns)
    out.backward(torch.ones_like(out))
    assert rows.grad.dtype is torch.float32
    torch.testing.assert_close(rows.grad, torch.full((4,), 64 * 300 * 8 * 0.25))


def test_no_gated_copy_of_the_weight_is_kept_for_backward():
    """Under ZeRO-3 a kept copy would be a whole weight on every rank."""
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    weight = torch.nn.Parameter(torch.randn(7, 5))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_linear(torch.randn(2, 5), weight, None, torch.ones(7, requires_grad=True), torch.ones(5))
    assert [t.data_ptr() for t in kept if t.shape == (7, 5)] == [weight.data_ptr()]


def _gradients(call, arguments, *, autocast):
    """Output of a function and gradients of its arguments; the backward pass is never under autocast."""
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = call(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return out, [leaf.grad for leaf in leaves]


KERNELS = {
    "rows and columns": (gated_linear, (32, 64), ((32,), (64,))),
    "transposed": (partial(gated_linear, transposed=True), (64, 32), ((32,), (64,))),
    "blocks": (partial(block_gated_linear, block=(2, 4)), (32, 64), ((16, 16),)),
}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_under_autocast_a_gated_linear_works_as_torchs_do(kernel, stored):
    """In bf16; the gradient of a weight has the weight's dtype, that of a gate is fp32."""
    call, shape, gates = KERNELS[kernel]
    weights = [torch.randn(shape).to(stored), torch.randn(32).to(stored)]
    arguments = [torch.randn(3, 5, 64), *weights, *(torch.rand(gate) for gate in gates)]
    reference, theirs = _gradients(call, [a.float() for a in arguments], autocast=False)
    out, ours = _gradients(call, arguments, autocast=True)
    assert out.dtype is torch.bfloat16
    assert [grad.dtype for grad in ours] == [argument.dtype for argument in arguments]
    for mine, exact in zip((out, *ours), (reference, *theirs), strict=True):
        torch.testing.assert_close(mine.float(), exact, rtol=0.02, atol=0.02 * float(exact.detach().abs().max()))


def test_under_autocast_a_pass_for_the_gates_alone_gives_their_gradients():
    x, weight, bias, rows, columns = (
        torch.randn(6, 64),
        torch.randn(32, 64),
        torch.randn(32),
        torch.rand(32),
        torch.rand(64),
    )
    found = []
    for autocast in (False, True):
        gate = columns.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = gated_linear(x, weight, bias, rows, gate, frozen=True)
        found += torch.autograd.grad(out.float().square().sum(), gate)
    assert found[1].dtype is torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02 * float(found[0].abs().max()))
