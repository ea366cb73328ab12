"""The closing report of a run as text: the compact model beside the dense one, or the two, that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsprune.measure.tables import render_table

__all__ = ["render_report"]

TOLERANCE = 0.005
"""How far the exported sparsity may be from the target before the report says so."""
SPEED_TOLERANCE = 0.05
"""How far the measured speedup may be from the one asked for, as a share of it, likewise."""
Figures = Mapping[str, Any]


def _beside(figures: Figures) -> list[str]:
    """The models that the compact one stands beside, in the order of the table."""
    return ["dense"] if "dense" in figures else ["teacher", "base"]


def _row(kind: str, entry: Figures, metrics: list[str], base: Figures) -> list[str]:
    """Name, metrics, sizes and latency of a model. Sparsity is that of what was pruned: a teacher apart has none."""
    shares = ["-", "-"]
    if kind != "teacher":
        shares = [f"{1 - entry['parameters'][of] / base['parameters'][of]:.1%}" for of in ("encoder", "total")]
    return [
        kind,
        *(f"{entry['metrics'][name]:.4f}" if name in entry["metrics"] else "-" for name in metrics),
        f"{entry['parameters']['encoder']:,}",
        f"{entry['parameters']['total']:,}",
        *shares,
        f"{entry['latency_ms']:.2f}",
    ]


def _table(figures: Figures) -> str:
    beside, compact = _beside(figures), figures["compact"]
    metrics, base = list(compact["metrics"]), figures[beside[-1]]
    rows = [_row(kind, figures[kind], metrics, base) for kind in (*beside, "compact")]
    sizes = ["encoder params", "total params", "encoder sparsity", "total sparsity"]
    headers = ["model", *metrics, *sizes, "latency ms"]
    if beside == ["dense"]:
        headers.append("speedup")
        rows[0].append("1.00x")
    else:
        headers += [f"over the {kind}" for kind in beside]
        for row in rows[:-1]:
            row += ["-"] * len(beside)
    rows[-1] += [_speedup(compact["speedup"][kind]) for kind in beside]
    return render_table(headers, rows)


def _speedup(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 1 else f"{ratio:.2f}x (slower)"


def _landing(figures: Figures, folder: str) -> list[str]:
    landing, blocks = figures["landing"], figures["blocks"]
    lines = _fast(landing["speedup"], landing["of"]) if "speedup" in landing else _sparse(landing, folder)
    lines += _lagging("pruning", landing)
    if blocks is not None:
        lines.append(
            f"blocks: {blocks['target']:.1%} of the encoder that was left, exported: {blocks['measured']:.2%}; "
            f"together {blocks['together']:.2%} of the dense encoder"
        )
        lines += _lagging("blocks", blocks)
    return lines


def _fast(speedup: Figures, of: str) -> list[str]:
    """What came of a speedup that was asked for."""
    asked, predicted, measured = (speedup[name] for name in ("asked", "predicted", "measured"))
    said = "not predicted" if predicted is None else f"predicted {predicted:.2f}x"
    lines = [f"speedup: asked for {asked:g}x in {of}, {said}, measured {measured:.2f}x"]
    off = measured / asked - 1
    if abs(off) > SPEED_TOLERANCE:
        landed = speedup["landed"]
        why = "" if landed is None else f"; when units were chosen: {landed['told']}"
        lines.append(f"the speedup is {100 * abs(off):.0f}% too {'low' if off < 0 else 'high'}{why}")
    return lines


def _sparse(landing: Figures, folder: str) -> list[str]:
    """What came of a share that was to go."""
    lines = [f"target: {landing['target']:.1%} of {landing['of']}, exported: {landing['measured']:.2%}"]
    missed = abs(landing["measured"] - landing["target"])
    if missed > TOLERANCE:
        lines.append(
            f"the target was missed by {100 * missed:.1f} points: the units of this model are coarser than that, or "
            f"pruning was too short for the target (see {folder}/report.png)"
        )
    return lines


def _lagging(stage: str, landing: Figures) -> list[str]:
    """What is to be said where training did not bring the gates to their target."""
    learned = landing["learned"]
    return [f"{stage} did not track its target: {learned['told']}"] if learned.get("missed") else []


def render_report(figures: Figures, folder: str, final: str) -> str:
    """What report.json says, for people.

    Args:
        figures: what it holds.
        folder: of the run.
        final: folder of the compact model.
    """
    bench = figures["bench"]
    timed = bench["rows"][0]
    turns = "alternating runs" if "dense" in figures else "alternating runs of each pair"
    lines = [
        "",
        _table(figures),
        f"latency: median of {bench['runs']} {turns}, batch {timed['batch_size']}, length {bench['length']}, "
        f"{bench['dtype']}, {bench['device']}",
    ]
    if "teacher" in figures:
        lines += [
            f"teacher: {figures['teacher']['source']}",
            f"base: {figures['base']['source']}, which was pruned; of it only sizes and speed are taken",
        ]
    if (given := figures["given_teacher"]) is not None:
        scores = "  ".join(f"{name} {value:.4f}" for name, value in given["metrics"].items())
        lines.append(f"teacher, as it was given: {scores} ({given['path']})")
    lines += [*_landing(figures, folder), *(f"note: {note}" for note in figures["notes"])]
    lines.append(f"model: {final}   report: {folder}/report.json, {folder}/report.png")
    return "\n".join(lines)
