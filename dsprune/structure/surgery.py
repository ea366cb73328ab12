"""Cutting one dense parameter down to its compact form: fold the scales, keep the slices.

Works tensor by tensor, so that a model of any size can pass through a small memory.
"""

from __future__ import annotations

from torch import Tensor

from dsprune.structure.selection import Selection
from dsprune.structure.spaces import ParamSpec, Space

__all__ = ["compact_shape", "cut", "is_removed"]


def is_removed(param: ParamSpec, selection: Selection) -> bool:
    """Whether the parameter is gone from the exported model: its sublayer is removed, or nothing of it is left."""
    if param.sublayer is not None and not selection.alive(param.sublayer.kind, param.sublayer.layer):
        return True
    return 0 in compact_shape(param, selection)


def compact_shape(param: ParamSpec, selection: Selection) -> tuple[int, ...]:
    """Shape of the parameter in the exported model."""
    return tuple(
        extent if space is None else len(selection.kept(space))
        for extent, space in zip(param.shape, param.axes, strict=True)
    )


def _scale(space: Space, selection: Selection) -> Tensor | None:
    """Scale of each entry along a gated axis, fp64; None where there is nothing to fold."""
    scale = selection.gate(space)
    return None if bool((scale == 1).all()) else scale


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
    for axis, space in enumerate(param.axes):
        if space is None:
            continue
        entries = selection.kept(space)
        scale = _scale(space, selection) if param.gated[axis] else None
        if len(entries) != tensor.shape[axis]:
            tensor = tensor.index_select(axis, entries)
        if scale is not None:
            shape = [1] * tensor.dim()
            shape[axis] = -1
            tensor = tensor * scale[entries].to(tensor.dtype).view(shape)
    return tensor.contiguous()
