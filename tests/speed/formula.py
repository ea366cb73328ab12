"""Latency tables made by hand, of tiny models: every time in them is a formula's."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from dsprune.structure import Structure
from dsprune.structure.latency import Conditions, LatencyTable, ModelIdentity, PartTimes, WidthTime, parts_of

HIDDEN = (1, 8, 16, 32)
"""Widths of tables of models that are 32 wide."""
HERE = Conditions(device="a device", dtype="float32", batch=4, length=16, threads=1, runtime="torch", torch="2.13.0")


def stays(width: float) -> float:
    return 1 + width / 4


def idle(width: float) -> float:
    return 0.25 + width / 64


def base(width: float) -> float:
    """What a sublayer takes before its first unit."""
    return 0.5 + width / 32


def neurons(count: float, width: float) -> float:
    return base(width) + count * width / 256


def attention(heads: float, queries: float, values: float, widest: float, width: float, head_dim: int) -> float:
    """Products of what is kept with the width, and scores of heads that are padded to the widest."""
    kept = (queries + 2 * values) / 3 / head_dim
    return base(width) + kept * width / 8 + heads * (0.5 + widest / head_dim)


def _whole(structure: Structure) -> float:
    sizes = structure.sizes
    dims, heads = sizes.head_dim, sizes.num_groups
    one = attention(heads, heads * dims, heads * dims, dims, sizes.hidden, dims)
    return stays(sizes.hidden) + sizes.num_attn * one + sizes.num_ffn * neurons(sizes.ffn_dim, sizes.hidden)


def formula_table(structure: Structure) -> LatencyTable:
    """The table that measuring those formulas would give."""
    return _table(structure, lambda value: value)


def noisy_table(structure: Structure, generator: Generator) -> LatencyTable:
    """Likewise, each time multiplied by anything from a half to twice."""
    return _table(structure, lambda value: float(value * 2 ** generator.uniform(-1, 1)))


def _table(structure, seen) -> LatencyTable:
    sizes = structure.sizes
    dims, groups = sizes.head_dim, sizes.num_groups
    hidden = tuple(sorted({width for width in HIDDEN if width < sizes.hidden} | {sizes.hidden}))

    def part(kind):
        units = sorted({1, 2, groups} if kind == "attn" else {1, sizes.ffn_dim // 4, sizes.ffn_dim})
        whole = {
            "attn": lambda n, d: attention(n, n * dims, n * dims, dims, d, dims),
            "ffn": neurons,
        }[kind]
        widths = tuple(width(*sizes_) for sizes_ in ragged()) if kind == "attn" and dims >= 4 else ()
        return PartTimes(
            kind=kind,
            units=tuple(units),
            ms=tuple(tuple(seen(whole(n, d)) for d in hidden) for n in units),
            widths=widths,
        )

    def ragged():
        """Dimensions of queries and of values that the heads keep, the first one all of `widest`."""
        for widest in {2, dims // 2}:
            yield widest, 2, 2
        yield dims, 2, 2
        yield dims, dims // 2, dims // 2
        yield dims, dims // 2, dims
        yield dims, dims, dims // 2

    def width(widest, queries, values):
        total = [widest + own * (groups - 1) for own in (queries, values)]
        ms = attention(groups, *total, widest, sizes.hidden, dims)
        return WidthTime(heads=groups, queries=total[0], values=total[1], widest=widest, ms=seen(ms))

    return LatencyTable(
        conditions=HERE,
        model=ModelIdentity.of(structure),
        rounds=9,
        noise=0.01,
        whole=_whole(structure),
        hidden=hidden,
        stays=tuple(seen(stays(d)) for d in hidden),
        idle=tuple(seen(idle(d)) for d in hidden),
        parts={name: part(own[0].kind) for name, own in parts_of(structure).items()},
    )


def draw_nested(structure: Structure, shapes, seed: int, *, levels: int = 6):
    """Hard gates of all kinds, each level within the one before; a hidden dimension and a pooler's row stay."""
    generator = np.random.default_rng(seed)
    ranks = {kind: generator.random(shape) for kind, shape in shapes.items()}
    for kind in ("attn", "ffn"):
        ranks[kind] *= 0.5
    for kind in ("hidden", "pooler"):
        if kind in ranks:
            ranks[kind].flat[0] = 0
    for level in np.linspace(1, 0.05, levels):
        yield {kind: own <= level for kind, own in ranks.items()}
