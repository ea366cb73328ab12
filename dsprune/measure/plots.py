"""Pictures of a run: what was kept in each layer, and how sparsity and metric went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_run"]

STAGES = ("teacher", "prune", "recover")
KEPT, DENSE, METRIC, TARGET = "#0072B2", "#DDDDDD", "#D55E00", "#555555"


def _curve(metrics: Sequence[Mapping[str, Any]], key: str, offsets: Mapping[str, int]) -> tuple[list[int], list[float]]:
    points = [(offsets[m["stage"]] + m["step"], float(m[key])) for m in metrics if key in m and m["stage"] in offsets]
    return [x for x, _ in points], [y for _, y in points]


def _offsets(metrics: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Where each stage begins when all are laid one after another."""
    offsets: dict[str, int] = {}
    begin = 0
    for stage in STAGES:
        steps = [int(m["step"]) for m in metrics if m.get("stage") == stage]
        if steps:
            offsets[stage] = begin
            begin += max(steps)
    return offsets


def _bars(axis: Any, layers: Sequence[Mapping[str, int]], key: str, dense: int, title: str) -> None:
    positions = range(len(layers))
    counts = [layer[key] for layer in layers]
    axis.bar(positions, [dense] * len(layers), color=DENSE, label="dense")
    axis.bar(positions, counts, color=KEPT, label="kept")
    for x, count in zip(positions, counts, strict=True):
        axis.text(x, count + dense * 0.01, str(count), ha="center", va="bottom", fontsize=8)
    axis.set(title=title, xlabel="layer", xticks=list(positions), ylim=(0, dense * 1.12))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _curves(axis: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    offsets = _offsets(metrics)
    axis.set(title="sparsity and metric", xlabel="optimizer step", ylabel="sparsity", ylim=(0, 1.02))
    lines: list[Any] = []
    for key, label, style in (
        ("sparsity/target", "target", {"color": TARGET, "linestyle": ":"}),
        ("sparsity/expected", "expected", {"color": KEPT, "linestyle": "--"}),
        ("sparsity/hard", "hard", {"color": KEPT}),
    ):
        xs, ys = _curve(metrics, key, offsets)
        if xs:
            lines += axis.plot(xs, ys, label=label, **style)
    names = sorted({key for line in metrics for key in line if key.startswith("eval/")})
    if names:
        twin = axis.twinx()
        twin.set_ylabel("metric", color=METRIC)
        for name, marker in zip(names, "osv^Dx", strict=False):
            xs, ys = _curve(metrics, name, offsets)
            label = name.removeprefix("eval/")
            lines += twin.plot(xs, ys, color=METRIC, marker=marker, markersize=4, linewidth=1, label=label)
    for stage, begin in offsets.items():
        axis.axvline(begin, color="#BBBBBB", linewidth=0.8)
        axis.annotate(stage, (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -12),
                      textcoords="offset points", fontsize=8, color=TARGET)
    if lines:
        labels = [line.get_label() for line in lines]
        axis.legend(lines, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(lines), frameon=False)


def plot_run(
    metrics: Sequence[Mapping[str, Any]],
    layers: Sequence[Mapping[str, int]],
    dense_sizes: Mapping[str, int],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw kept heads, kept FFN sizes and the run's curves into one PNG.

    Args:
        metrics: lines of metrics.jsonl.
        layers: for each dense layer what is kept: `heads` and `ffn_dim` (0: removed).
        dense_sizes: `heads` and `ffn_dim` of the dense model.
        path: file to write.
        title: of the whole picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    heads, ffn, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.5])
    _bars(heads, layers, "heads", dense_sizes["heads"], "attention heads kept")
    _bars(ffn, layers, "ffn_dim", dense_sizes["ffn_dim"], "FFN size kept")
    _curves(curves, metrics)
    for axis in (heads, ffn, curves):
        axis.grid(axis="y", color="#EEEEEE")
        axis.set_axisbelow(True)
        axis.spines[["top"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
