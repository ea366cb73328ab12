"""A latency table as text: what was measured on what, what each part takes, and what was smoothed."""

from __future__ import annotations

from dsprune.measure.tables import render_table
from dsprune.structure import Structure
from dsprune.structure.latency import Conditions, LatencyCost, LatencyTable, PartTimes, parts_of

__all__ = ["describe_conditions", "render_latency"]


def describe_conditions(where: Conditions) -> str:
    """Device, dtype, shape of the input and versions, in one line."""
    device = f"{where.device}, {where.threads} thread(s)" if where.threads else where.device
    shape = f"batch {where.batch} x {where.length} tokens"
    return f"{device}, {where.dtype}, {shape}, {where.runtime}, torch {where.torch}"


def render_latency(table: LatencyTable, structure: Structure) -> str:
    """What a user is to see of a table.

    Args:
        table: of the model.
        structure: of the model.
    """
    total = float(LatencyCost(structure, table).milliseconds({}))
    counts = {name: len(sublayers) for name, sublayers in parts_of(structure).items()}
    rows = [["all else", "1", "", f"{table.stays[-1]:.3f}", f"{table.stays[-1] / total:.1%}"]]
    for name, part in table.parts.items():
        dense = part.ms[-1][-1]
        units = f"{part.units[-1]:,} {'heads' if part.kind == 'attn' else 'neurons'}"
        rows.append([name, str(counts[name]), units, f"{dense:.3f}", f"{counts[name] * dense / total:.1%}"])
    lines = [
        describe_conditions(table.conditions),
        "",
        render_table(["part", "how many", "of", "ms each", "of the whole"], rows, align="<><>>"),
        "",
        f"the dense model: {table.whole:.2f} ms in its own class, {total:.2f} ms as parts of compact ones",
        f"medians of {table.rounds} rounds, good to {table.noise:.1%}",
        "",
        *(line for name, part in table.parts.items() for line in _curves(name, part, table)),
        *(f"smoothed: {line}" for line in table.smoothed()),
    ]
    return "\n".join(lines).rstrip()


def _curves(name: str, part: PartTimes, table: LatencyTable) -> list[str]:
    """Times of a part by units and hidden width, and of heads that lost dimensions."""
    headers = [f"{name} ms", *(f"hidden {width}" for width in table.hidden)]
    rows = [[str(units), *(f"{time:.3f}" for time in times)] for units, times in zip(part.units, part.ms, strict=True)]
    lines = [render_table(headers, rows, align=">" * len(headers)), ""]
    if part.widths:
        ragged = [
            [str(one.heads), str(one.queries), str(one.values), str(one.widest), f"{one.ms:.3f}"] for one in part.widths
        ]
        columns = ["heads", "query dimensions", "value dimensions", "widest head", f"{name} ms"]
        lines += [render_table(columns, ragged, align=">>>>>"), ""]
    return lines
