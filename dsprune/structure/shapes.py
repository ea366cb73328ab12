"""Sizes that are the same in every layer: what they cost, and whether a stock class can have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dsprune.errors import ConfigError
from dsprune.structure.budget import Budget
from dsprune.structure.spaces import Structure, gate_shapes

__all__ = [
    "check_shape",
    "find_shape",
    "follow_hidden",
    "shape_gates",
    "shape_kinds",
    "sharable_kinds",
    "stock_heads_fit",
]

KIND = {"hidden": "hidden", "ffn": "ffn_dim", "heads": "head"}
"""Kind of the gates that decide over a size. Whole layers have two, `attn` and `ffn`."""


EXACT, LEEWAY = 1e-9, 0.005


def stock_heads_fit(structure: Structure, num_heads: int, hidden: int) -> bool:
    """Whether the stock class can have so many heads, of the size that they have, in a model of this width."""
    rule = structure.family.stock_heads
    if num_heads == 0:
        return False
    if rule == "all":
        return num_heads == structure.sizes.num_heads
    if rule == "equal":
        return num_heads * structure.sizes.head_dim == hidden
    return rule == "free" or hidden % num_heads == 0


def _dense(structure: Structure) -> dict[str, int]:
    sizes = structure.sizes
    return {"hidden": sizes.hidden, "ffn": sizes.ffn_dim, "heads": sizes.num_heads, "layers": sizes.num_layers}


def shape_kinds(shape: Mapping[str, int]) -> tuple[str, ...]:
    """Kinds of gates that have to close for a shape."""
    kinds = [KIND[name] for name in shape if name in KIND]
    return (*kinds, *(("attn", "ffn") if "layers" in shape else ()))


def sharable_kinds(structure: Structure, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Those kinds of gates whose sizes all layers of a stock model can share, while the others stay open."""
    widths = () if structure.keeps_width or structure.scales_head else ("hidden",)
    sharable = [kind for kind in kinds if kind in ("ffn_dim", *widths)]
    # Heads alone cannot go where a stock model wants them to fill the hidden size.
    rule = structure.family.stock_heads
    if rule in ("divides", "free") or (rule == "equal" and "hidden" in sharable):
        sharable += [kind for kind in kinds if kind == "head"]
    return tuple(sharable)


def follow_hidden(structure: Structure, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates of a shape with those of the pooler: a stock class has as many rows there as hidden dimensions, and the
    rows of the hidden dimensions that stay are those that stay."""
    if structure.pooler is None or "hidden" not in gates:
        return dict(gates)
    return {**gates, "pooler": gates["hidden"]}


def check_shape(structure: Structure, shape: Mapping[str, int], kinds: tuple[str, ...]) -> None:
    """See that a shape is within the dense model, that there are gates for it, and that a stock class can have it.

    Args:
        structure: of the dense model.
        shape: sizes by name: `hidden`, `ffn`, `heads` (query heads), `layers`.
        kinds: gates that may close.

    Raises:
        ConfigError: with every mistake that was found.
    """
    dense, sizes = _dense(structure), structure.sizes
    mistakes = []
    for name, size in shape.items():
        if size > dense[name]:
            mistakes.append(f"shape.{name} = {size}: the dense model has {dense[name]}")
        missing = set(shape_kinds({name: size})) - set(kinds)
        if size < dense[name] and missing:
            mistakes.append(f"shape.{name} = {size}: the method has no gates of '{', '.join(sorted(missing))}'")
    heads, hidden = (shape.get(name, dense[name]) for name in ("heads", "hidden"))
    if hidden < dense["hidden"] and structure.keeps_width:
        mistakes.append(f"shape.hidden = {hidden}: pooler or head stay {dense['hidden']} wide, as in no stock model")
    if hidden < dense["hidden"] and structure.scales_head:
        mistakes.append(
            f"shape.hidden = {hidden}: a stock '{structure.family.name}' scales its output by its own width"
        )
    if "layers" in shape and len(structure.stacks) > 1:
        stacks = " and ".join(stack.spec.name for stack in structure.stacks)
        mistakes.append(f"shape.layers = {shape['layers']}: {stacks} have layers of their own")
    if heads % sizes.heads_per_group:
        mistakes.append(
            f"shape.heads = {heads}: heads go in groups of {sizes.heads_per_group}, which share their keys and values"
        )
    elif not stock_heads_fit(structure, heads, hidden):
        wants = {
            "equal": f"heads of {sizes.head_dim} dimensions to fill the hidden size",
            "divides": "a hidden size that the number of heads divides",
            "all": f"{dense['heads']} heads in every layer, whose columns of one table they are",
        }[structure.family.stock_heads]
        mistakes.append(f"shape: {heads} heads and hidden size {hidden}: a stock '{structure.family.name}' has {wants}")
    if mistakes:
        raise ConfigError(*mistakes)


def shape_gates(structure: Structure, shape: Mapping[str, int]) -> dict[str, Tensor]:
    """Some hard gates of a shape: those that keep the first units, of a pooler as many as hidden dimensions."""
    kept = {KIND[name]: size for name, size in shape.items() if name in KIND}
    if "heads" in shape:
        kept["head"] = shape["heads"] // structure.sizes.heads_per_group
    kept |= dict.fromkeys(("attn", "ffn"), shape["layers"]) if "layers" in shape else {}
    gates = {kind: torch.ones(gate_shapes(structure.sizes)[kind]) for kind in kept}
    for kind, count in kept.items():
        gates[kind][..., count:] = 0
    return follow_hidden(structure, gates)


def find_shape(structure: Structure, budget: Budget, wanted: Mapping[str, float]) -> dict[str, int]:
    """The shape at a budget's target that is nearest to what is wanted, and that a stock class can have.

    Args:
        structure: of the dense model.
        budget: what that model's units cost, with the sparsity to land on.
        wanted: share to keep of `hidden`, `ffn` and `heads`; a size that is not named stays.

    Returns:
        Sizes by name, sparse enough for the target wherever any are.
    """

    def rank(shape: dict[str, int]) -> tuple[float, float]:
        miss = budget.target - budget.removed(shape_gates(structure, shape))
        dense = _dense(structure)
        distance = sum(abs(size / dense[name] - wanted[name]) for name, size in shape.items())
        # Too dense is worse than anything; too sparse counts once it is more than what invariant 7 allows.
        return (1 + miss if miss > EXACT else max(0.0, -miss - LEEWAY)), distance

    return min(_candidates(structure, budget, wanted), key=rank)


def _candidates(structure: Structure, budget: Budget, wanted: Mapping[str, float]) -> Iterator[dict[str, int]]:
    """Shapes of all numbers of heads, each with the widths nearest to what is wanted and the FFN size that lands."""
    dense = _dense(structure)
    step = structure.sizes.heads_per_group
    for heads in range(step, dense["heads"] + 1, step) if "heads" in wanted else (dense["heads"],):
        for hidden in _widths(structure, heads, wanted):
            shape = {name: size for name, size in (("heads", heads), ("hidden", hidden)) if name in wanted}
            if "ffn" not in wanted:
                yield shape
                continue
            yield {**shape, "ffn": _landing_size(structure, budget, shape)}


def _landing_size(structure: Structure, budget: Budget, shape: Mapping[str, int]) -> int:
    """The largest FFN size that leaves no more than the budget beside the other sizes; 1 where none does.

    What a model costs rises with its FFNs, whatever is counted, so that this is found by halving.
    """
    low, high = 1, structure.sizes.ffn_dim
    while low < high:
        middle = (low + high + 1) // 2
        fits = budget.removed(shape_gates(structure, {**shape, "ffn": middle})) >= budget.target - EXACT
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _widths(structure: Structure, heads: int, wanted: Mapping[str, float]) -> list[int]:
    """Hidden sizes that a stock class can have with so many heads, the nearest to what is wanted on either side."""
    dense = structure.sizes.hidden
    if "hidden" not in wanted or structure.keeps_width or structure.scales_head:
        return [dense] if stock_heads_fit(structure, heads, dense) else []
    fitting = [width for width in range(1, dense + 1) if stock_heads_fit(structure, heads, width)]
    return sorted(fitting, key=lambda width: abs(width - wanted["hidden"] * dense))[:2]
