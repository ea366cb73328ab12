"""Pictures of a run: what was kept in every layer, and how sparsity and metric went.

matplotlib is imported when something is drawn, and its global state (pyplot, backend) is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsprune.errors import OutputError
from dsprune.run_folder import TRAINING_STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

__all__ = ["plot_run"]

SIZE_INCHES = (12.0, 8.0)
DPI = 150


INK, MUTED, GRID, DENSE, SHADE = "#333333", "#666666", "#DEDEDE", "#EDEDED", "#F6F6F6"
# Okabe and Ito's palette: told apart by colour-blind readers, and here by line style or marker as well.
BLUE, ORANGE, GREEN, PURPLE, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
SPARSITIES: dict[str, dict[str, Any]] = {
    "target": {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 1.3, "zorder": 4},
    "expected": {"color": ORANGE, "linewidth": 2.6},
    "hard": {"color": BLUE, "linewidth": 1.5},
}
METRICS = ((GREEN, "o"), (PURPLE, "s"), (VERMILION, "^"), (INK, "D"))
ROOMY, CROWDED = 12, 36
"""Layers up to which counts are written on the bars, and up to which they still are, but upright."""
NARROW = 0.08
"""Share of the axis under which a stage has no room for its name."""

Metrics = Sequence[Mapping[str, Any]]


def plot_run(
    metrics: Metrics,
    layers: Sequence[Mapping[str, int]],
    dense_sizes: Mapping[str, int],
    path: Path,
    *,
    metric: str,
    title: str,
) -> None:
    """Draw a run into a PNG of 1800 x 1200 pixels: kept heads, kept FFN sizes, curves over all stages.

    Args:
        metrics: lines of the run's metrics.jsonl: `stage` and `step` (each stage counts from 0), with any of
            `sparsity/target`, `sparsity/expected`, `sparsity/hard` and `eval/METRIC` or `eval/SPLIT/METRIC`. What is
            missing is not drawn.
        layers: for each dense layer, the kept `heads` and `ffn_dim`; 0 is a removed sublayer.
        dense_sizes: `heads` and `ffn_dim` of every dense layer.
        path: file to write.
        metric: name of the one to draw, of all splits: others, such as thresholds, are not on its scale.
        title: above it all.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, fontsize=13, color=INK)
    panels = figure.subplot_mosaic([["heads", "ffn_dim"], ["curves", "curves"]], height_ratios=[1, 1.25])
    for axes in panels.values():
        _tidy(axes)
    for kind, name in (("heads", "attention heads"), ("ffn_dim", "FFN size")):
        _draw_kept(panels[kind], [layer[kind] for layer in layers], dense_sizes[kind], name)
    _draw_curves(panels["curves"], metrics, metric)
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise OutputError(f"cannot write the picture {path}: {error.strerror}") from error


def _tidy(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)


def _draw_kept(axes: Axes, kept: Sequence[int], dense: int, name: str) -> None:
    """Bars of what is kept, in front of pale ones of the dense count."""
    from matplotlib.ticker import MaxNLocator

    places = range(len(kept))
    axes.bar(places, [dense] * len(kept), color=DENSE, width=0.8, label=f"dense ({dense:,})", zorder=0.4)
    axes.bar(places, kept, color=BLUE, width=0.8, label="kept")
    if len(kept) <= CROWDED:
        style: dict[str, Any] = {"fontsize": 9} if len(kept) <= ROOMY else {"fontsize": 7, "rotation": 90}
        for place, count in zip(places, kept, strict=True):
            axes.annotate(str(count), (place, count), (0, 3), textcoords="offset points", ha="center", **style)
    share = sum(kept) / max(1, dense * len(kept))
    axes.set_title(f"{name} kept: {share:.1%} of all", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("layer", color=INK)
    axes.set_xlim(-0.7, max(1, len(kept)) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=2 * ROOMY, integer=True))
    axes.set_ylim(0, dense * 1.15)
    axes.set_yticks(sorted({dense * quarter // 4 for quarter in range(5)}))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)


def _draw_curves(axes: Axes, metrics: Metrics, metric: str) -> None:
    """Sparsity on the left axis, the metric on the right one, the stages one after another."""
    starts = _stage_starts(metrics)
    axes.set_title("sparsity and metric", loc="left", fontsize=11, color=INK, pad=20)
    axes.set_xlabel("optimizer step, the stages one after another", color=INK)
    axes.set_ylabel("sparsity", color=INK)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    end = max(1, sum(steps for _, steps in starts.values()))
    axes.set_xlim(-0.01 * end, 1.01 * end)
    lines = _draw_sparsities(axes, metrics, starts) + _draw_metric(axes, metrics, starts, metric)
    if lines:
        style: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1.04), "frameon": False, "fontsize": 9}
        axes.legend(handles=lines, ncols=len(lines), **style)
    else:
        axes.text(0.5, 0.5, "no sparsity and no metric was logged", transform=axes.transAxes, ha="center", color=MUTED)
    _mark_stages(axes, starts)


def _stage_starts(metrics: Metrics) -> dict[str, tuple[int, int]]:
    """For each stage that logged something: where it begins on the common axis, and its number of steps."""
    starts: dict[str, tuple[int, int]] = {}
    begin = 0
    for stage in TRAINING_STAGES:
        steps = [int(line["step"]) for line in metrics if line.get("stage") == stage]
        if steps:
            starts[stage] = (begin, max(steps))
            begin += max(steps)
    return starts


def _curve(metrics: Metrics, stage: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric within one stage, in order of the steps."""
    points = sorted(
        (int(line["step"]), float(line[name])) for line in metrics if line.get("stage") == stage and name in line
    )
    return [step for step, _ in points], [value for _, value in points]


def _draw_line(
    axes: Axes, metrics: Metrics, starts: Mapping[str, tuple[int, int]], name: str, label: str, **style: Any
) -> list[Line2D]:
    """One metric, broken between stages; the line that stands for it in the legend, or none."""
    drawn: list[Line2D] = []
    for stage, (begin, _) in starts.items():
        steps, values = _curve(metrics, stage, name)
        if steps:
            drawn += axes.plot([begin + step for step in steps], values, label=label, **style)
    return drawn[:1]


def _draw_sparsities(axes: Axes, metrics: Metrics, starts: Mapping[str, tuple[int, int]]) -> list[Line2D]:
    lines: list[Line2D] = []
    for name, style in SPARSITIES.items():
        lines += _draw_line(axes, metrics, starts, f"sparsity/{name}", f"{name} sparsity", **style)
    return lines


def _draw_metric(axes: Axes, metrics: Metrics, starts: Mapping[str, tuple[int, int]], metric: str) -> list[Line2D]:
    logged = {name for line in metrics for name in line if name.startswith("eval/")}
    names = sorted(name for name in logged if name.split("/")[-1] == metric)
    if not names:
        return []
    twin = axes.twinx()
    twin.spines[["top", "left", "bottom"]].set_visible(False)
    twin.spines["right"].set_color(MUTED)
    twin.tick_params(colors=INK, labelsize=9)
    twin.margins(y=0.15)
    twin.set_ylabel("metric", color=INK)
    lines: list[Line2D] = []
    for i, name in enumerate(names):
        color, marker = METRICS[i % len(METRICS)]
        style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1, "clip_on": False}
        label = f"{name.removeprefix('eval/')} (right)"
        lines += _draw_line(twin, metrics, starts, name, label, **style)
    return lines


def _mark_stages(axes: Axes, starts: Mapping[str, tuple[int, int]]) -> None:
    """Every second stage shaded, each named above its part of the axis; narrow outer ones keep inside it."""
    end = max(1, sum(steps for _, steps in starts.values()))
    for i, (stage, (begin, steps)) in enumerate(starts.items()):
        if i % 2:
            axes.axvspan(begin, begin + steps, color=SHADE, zorder=0, linewidth=0)
        if i:
            axes.axvline(begin, color=MUTED, linewidth=0.8, zorder=1)
        side, place = "center", begin + steps / 2
        if steps < NARROW * end and i in (0, len(starts) - 1):
            side, place = ("left", begin) if i == 0 else ("right", begin + steps)
        style: dict[str, Any] = {"ha": side, "fontsize": 9, "color": MUTED}
        axes.annotate(stage, (place, 1), (0, 3), ("data", "axes fraction"), "offset points", **style)
