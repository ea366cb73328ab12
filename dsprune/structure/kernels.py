"""Where a gate meets arithmetic: a linear with gated rows and columns, or blocks, and a norm over live coordinates.

They are autograd functions because the obvious expressions keep a gated copy of every weight, or
several copies of every activation, alive until the backward pass. Under ZeRO-3 that copy would be a
whole layer's weights on every rank. These keep the parameter itself (which ZeRO gathers again) and
recompute.

Under `torch.autocast` they work as torch's own linears: the input is cast, the weight while it computes, and the
gradient of a weight has the weight's dtype (`autocast.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dsprune.structure.autocast import autocast_input, without_autocast

__all__ = ["block_gated_linear", "gated_linear", "live_layer_norm", "live_rms_norm", "sum_blocks"]


def _scaled(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return weight * torch.outer(rows, columns).to(weight.dtype)


class _GatedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        columns: Tensor,
        frozen: bool,
        transposed: bool,
    ) -> Tensor:
        ctx.frozen, ctx.transposed = frozen, transposed
        # The parameter itself, and no transposed view of it: an alias would outlive what ZeRO-3 has gathered.
        ctx.save_for_backward(x, weight, bias, rows, columns)
        gated_bias = None if bias is None else (bias * rows.to(bias.dtype)).to(x.dtype)
        weight = weight.t() if transposed else weight
        return torch.nn.functional.linear(x, _scaled(weight, rows, columns).to(x.dtype), gated_bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, bias, rows, columns = ctx.saved_tensors
        weight = weight.t() if ctx.transposed else weight
        need_x, need_weight, need_bias, need_rows, need_columns, *_ = ctx.needs_input_grad
        need_weight, need_bias = need_weight and not ctx.frozen, need_bias and not ctx.frozen
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = grad_bias = grad_rows = grad_columns = None
        if need_columns and not (need_weight or need_rows):
            # A pass for the gates alone: one product gives the gradients of the input and of its gates.
            inner = flat @ _scaled(weight, rows, torch.ones_like(columns)).to(x.dtype)
            grad_columns = (inner.to(columns.dtype) * x.reshape(inner.shape).to(columns.dtype)).sum(0)
            grad_x = (inner * columns.to(inner.dtype)).view(x.shape) if need_x else None
            return grad_x, None, None, None, grad_columns, None, None
        grad_x = grad @ _scaled(weight, rows, columns).to(x.dtype) if need_x else None
        if need_weight or need_rows or need_columns:
            # Gradient of the gated weight; its elementwise product with the weight is, summed over a
            # unit, the first-order Taylor score of that unit.
            outer = flat.t() @ x.reshape(-1, x.shape[-1])
            if need_rows or need_columns:
                taylor = outer.to(rows.dtype) * weight.to(rows.dtype)
                grad_rows, grad_columns = taylor @ columns, rows @ taylor
            grad_weight = _scaled(outer.to(weight.dtype), rows, columns) if need_weight else None
            grad_weight = grad_weight.t() if grad_weight is not None and ctx.transposed else grad_weight
        if bias is not None and (need_bias or need_rows):
            summed = flat.sum(0)
            grad_bias = summed.to(bias.dtype) * rows.to(bias.dtype) if need_bias else None
            if grad_rows is not None:
                grad_rows = grad_rows + summed.to(rows.dtype) * bias.to(rows.dtype)
        return grad_x, grad_weight, grad_bias, grad_rows, grad_columns, None, None


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    frozen: bool = False,
    transposed: bool = False,
) -> Tensor:
    """`rows * (weight @ (columns * x) + bias)` without storing a gated copy of anything.

    Args:
        x: [..., in].
        weight: [out, in]; [in, out] where it is stored `transposed`.
        bias: [out] or None.
        rows: [out] gates of the output coordinates, fp32 (or fp64 with an fp64 model).
        columns: [in] gates of the input units.
        frozen: give weight and bias no gradients, and save their cost. They cannot be detached instead: under
            ZeRO-3 an alias would keep the gathered weight alive until the backward pass.
        transposed: how the weight is stored.

    Returns:
        [..., out] in the dtype of `x`, or of autocast. Gradients of the gates are formed in the gates' own dtype.
    """
    x = autocast_input(x)
    with without_autocast(x):
        return _GatedLinear.apply(x, weight, bias, rows, columns, frozen, transposed)  # type: ignore[no-any-return, no-untyped-call]


class _LiveLayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, alive: Tensor, eps: float) -> Tensor:
        wide = x.to(gate.dtype)
        live = (gate != 0).to(gate.dtype)
        count = live.sum().clamp(min=1)
        centred = (wide - (wide * live).sum(-1, keepdim=True) / count) * live
        rstd = torch.rsqrt(centred.square().sum(-1, keepdim=True) / count + eps)
        normed = centred * rstd
        out = torch.addcmul(bias * gate, normed, weight * gate)
        ctx.save_for_backward(normed, rstd, weight, bias, gate, live, count, alive)
        return torch.where(alive, out.to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        normed, rstd, weight, bias, gate, live, count, alive = ctx.saved_tensors
        wide = grad.to(gate.dtype)
        affine = wide * (weight * gate)
        mean = affine.sum(-1, keepdim=True) / count
        slope = (affine * normed).sum(-1, keepdim=True) / count
        grad_x = torch.where(alive, (rstd * (affine - (mean + normed * slope) * live)).to(grad.dtype), grad)
        width = gate.shape[0]
        by_normed = (wide * normed).reshape(-1, width).sum(0) * alive
        by_one = wide.reshape(-1, width).sum(0) * alive
        grad_weight = (by_normed * gate).to(weight.dtype)
        grad_bias = (by_one * gate).to(bias.dtype)
        grad_gate = by_normed * weight + by_one * bias
        return grad_x, grad_weight, grad_bias, grad_gate, None, None


def live_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, alive: Tensor, eps: float) -> Tensor:
    """LayerNorm over the live coordinates of the residual stream, times their gates.

    Mean and variance are those of the narrow, exported model: dead coordinates (gate 0) take no part
    and come out as 0. Where the sublayer is dead, `x` passes untouched. Nothing here waits for the
    device: which coordinates are live is arithmetic, not an index.

    Args:
        x: [..., d] residual stream plus sublayer output.
        weight: [d] gamma.
        bias: [d] beta.
        gate: [d] hidden gates, fp32 (or fp64 with an fp64 model).
        alive: [] bool, False where the sublayer is removed and the norm with it.
        eps: as in LayerNorm.

    Returns:
        [..., d] in the dtype of `x`.
    """
    return _LiveLayerNorm.apply(x, weight, bias, gate, alive, eps)  # type: ignore[no-any-return, no-untyped-call]


class _LiveRMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
        wide = x.to(gate.dtype)
        live = (gate != 0).to(gate.dtype)
        count = live.sum().clamp(min=1)
        rstd = torch.rsqrt((wide * live).square().sum(-1, keepdim=True) / count + eps)
        normed = wide * live * rstd
        ctx.save_for_backward(normed, rstd, weight, gate, live, count)
        return (normed * (weight * gate)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        normed, rstd, weight, gate, live, count = ctx.saved_tensors
        wide = grad.to(gate.dtype)
        affine = wide * (weight * gate)
        slope = (affine * normed).sum(-1, keepdim=True) / count
        grad_x = (rstd * (affine - normed * slope) * live).to(grad.dtype)
        by_normed = (wide * normed).reshape(-1, gate.shape[0]).sum(0)
        return grad_x, (by_normed * gate).to(weight.dtype), by_normed * weight, None


def live_rms_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """RMSNorm over the live coordinates of the residual stream, times their gates.

    The mean square is that of the narrow, exported model: dead coordinates (gate 0) take no part and come
    out as 0.

    Args:
        x: [..., d] residual stream.
        weight: [d].
        gate: [d] hidden gates, fp32 (or fp64 with an fp64 model).
        eps: as in RMSNorm.

    Returns:
        [..., d] in the dtype of `x`.
    """
    return _LiveRMSNorm.apply(x, weight, gate, eps)  # type: ignore[no-any-return, no-untyped-call]


def _spread_blocks(gate: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A gate for each number of a matrix, from one for each block."""
    wide = gate.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def sum_blocks(values: Tensor, block: tuple[int, int], grid: Sequence[int]) -> Tensor:
    """Sum over each block of a matrix: [block rows, block columns]."""
    rows, columns = grid[0] * block[0], grid[1] * block[1]
    padded = torch.nn.functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))
    return padded.view(grid[0], block[0], grid[1], block[1]).sum((1, 3))


class _BlockGatedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, block: tuple[int, int], frozen: bool
    ) -> Tensor:
        ctx.block, ctx.frozen, ctx.bias_dtype = block, frozen, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, gate)
        gated = weight * _spread_blocks(gate, block, weight.shape).to(weight.dtype)
        return torch.nn.functional.linear(x, gated.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, gate = ctx.saved_tensors
        need_x, need_weight, need_bias, need_gate, *_ = ctx.needs_input_grad
        wide = _spread_blocks(gate, ctx.block, weight.shape).to(weight.dtype)
        grad_x = grad @ (weight * wide).to(x.dtype) if need_x else None
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = grad_gate = None
        if need_gate or (need_weight and not ctx.frozen):
            outer = flat.t() @ x.reshape(-1, x.shape[-1])
            if need_gate:
                grad_gate = sum_blocks(outer.to(gate.dtype) * weight.to(gate.dtype), ctx.block, gate.shape)
            grad_weight = outer.to(weight.dtype) * wide if need_weight and not ctx.frozen else None
        grad_bias = flat.sum(0).to(ctx.bias_dtype) if need_bias and not ctx.frozen else None
        return grad_x, grad_weight, grad_bias, grad_gate, None, None


def block_gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, block: tuple[int, int], *, frozen: bool = False
) -> Tensor:
    """A linear whose weight is multiplied by a gate for each block, without storing a gated copy.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or None; not gated.
        gate: [block rows, block columns], fp32 (or fp64 with an fp64 model).
        block: rows and columns of a block; the last ones may reach beyond the matrix.
        frozen: as in `gated_linear`.

    Returns:
        [..., out] in the dtype of `x`, or of autocast.
    """
    x = autocast_input(x)
    with without_autocast(x):
        return _BlockGatedLinear.apply(x, weight, bias, gate, block, frozen)  # type: ignore[no-any-return, no-untyped-call]
