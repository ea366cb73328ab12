"""Cutting one dense parameter down to its compact form: fold the scales, keep the slices.

Works tensor by tensor, so that a model of any size can pass through a small memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsprune.structure.selection import Selection
from dsprune.structure.spaces import Axis, ParamSpec, Segment

__all__ = ["compact_shape", "cut", "is_removed"]


def is_removed(param: ParamSpec, selection: Selection) -> bool:
    """Whether the parameter is gone from the exported model: its sublayer is removed, or nothing of it is left."""
    if param.sublayer is not None:
        kind, index = param.sublayer.kind, param.sublayer.index
        if not (selection.has_units(kind, index) if param.inner else selection.alive(kind, index)):
            return True
    if param.users and not any(selection.has_units(user.kind, user.index) for user in param.users):
        return True
    return 0 in compact_shape(param, selection)


def compact_shape(param: ParamSpec, selection: Selection) -> tuple[int, ...]:
    """Shape of the parameter in the exported model."""
    return tuple(sum(_kept_entries(segment, selection) for segment in axis) for axis in param.axes)


def _kept_entries(segment: Segment, selection: Selection) -> int:
    if segment.space is None:
        return segment.extent
    return len(selection.kept(segment.space)) * segment.copies


def _gates(axis: Axis, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """Which entries of an axis are kept, as indices, and the scale of each, fp64; None where there is none to fold."""
    scales = [
        torch.ones(segment.extent, dtype=torch.float64)
        if segment.space is None
        else segment.spread(selection.gate(segment.space))
        for segment in axis
    ]
    kept = torch.cat(scales).nonzero().flatten()
    folded = [scale if segment.gated else (scale != 0).double() for segment, scale in zip(axis, scales, strict=True)]
    scale = torch.cat(folded)[kept]
    return kept, None if bool((scale == 1).all()) else scale


def cut(param: ParamSpec, tensor: Tensor, selection: Selection) -> Tensor:
    """The parameter as the exported model holds it.

    Args:
        param: its place in the structure.
        tensor: its dense value, of `param.shape`.
        selection: what is kept.

    Returns:
        A contiguous tensor of `compact_shape`, in the dtype of `tensor`.
    """
    assert tuple(tensor.shape) == param.shape, f"{param.name}: {tuple(tensor.shape)} is not {param.shape}"
    for i, axis in enumerate(param.axes):
        if all(segment.space is None for segment in axis):
            continue
        entries, scale = _gates(axis, selection)
        if len(entries) != tensor.shape[i]:
            tensor = tensor.index_select(i, entries)
        if scale is not None:
            shape = [1] * tensor.dim()
            shape[i] = -1
            tensor = tensor * scale.to(tensor.dtype).view(shape)
    return tensor.contiguous()
