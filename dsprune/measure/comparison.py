"""Finished runs side by side: one table, and which of them no other beats in both size and metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsprune.errors import OutputError
from dsprune.files import read_json
from dsprune.measure.tables import render_table
from dsprune.run_folder import RunFolder

__all__ = ["Point", "compare_runs", "pareto_front", "read_point"]


@dataclass(frozen=True)
class Point:
    """One finished run.

    Attributes:
        name: of its folder.
        task: what it was trained on.
        method: that pruned it.
        metric: name of the task's first metric.
        score: of the compact model.
        dense: of the dense one, which taught it.
        sparsity: of the encoder, as exported.
        parameters: of the compact model.
        speedup: over the dense model that it was cut from, as measured.
        lower_is_better: whether a small score is a good one.
    """

    name: str
    task: str
    method: str
    metric: str
    score: float
    dense: float
    sparsity: float
    parameters: int
    speedup: float
    lower_is_better: bool = False

    @property
    def merit(self) -> float:
        """The score, more being better."""
        return -self.score if self.lower_is_better else self.score


def read_point(run: Path) -> Point | None:
    """What a run's report says; None where the run has none yet."""
    try:
        report: dict[str, Any] = read_json(RunFolder(run).report)
        config: dict[str, Any] = read_json(RunFolder(run).config)
    except (OSError, ValueError):
        return None
    # Where the teacher is another model than the one that was pruned, the report has both.
    teacher, base, compact = report.get("teacher"), report.get("base"), report["compact"]
    dense = teacher or report["dense"]
    metric = next(iter(compact["metrics"]))
    return Point(
        name=run.name,
        task=report["task"],
        method=config["method"]["name"],
        metric=metric,
        score=compact["metrics"][metric],
        dense=dense["metrics"][metric],
        sparsity=compact["sparsity"]["encoder"],
        parameters=compact["parameters"]["total"],
        speedup=compact["speedup"]["base"] if base else dense["latency_ms"] / compact["latency_ms"],
        lower_is_better=report.get("lower_is_better", False),  # reports of earlier versions do not say
    )


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points of one task that no other equals or beats in both sparsity and score, by rising sparsity."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.sparsity, -p.merit)):
        if not front or point.merit > front[-1].merit:
            front.append(point)
    return front[::-1]


def compare_runs(runs: Sequence[Path], *, plot: Path | None = None) -> str:
    """A table of runs, the best of each task marked; draws them if asked.

    Raises:
        OutputError: the picture cannot be written.
    """
    points = [point for run in runs if (point := read_point(run)) is not None]
    unfinished = [run.name for run in runs if read_point(run) is None]
    tasks = list(dict.fromkeys(point.task for point in points))
    fronts = {task: pareto_front([point for point in points if point.task == task]) for task in tasks}
    rows = [
        [
            "*" if point in fronts[point.task] else "",
            point.name,
            point.task,
            point.method,
            f"{point.sparsity:.1%}",
            f"{point.parameters:,}",
            point.metric,
            f"{point.score:.4f}",
            f"{point.dense:.4f}",
            f"{point.speedup:.2f}x",
        ]
        for point in sorted(points, key=lambda p: (p.task, p.sparsity, p.method))
    ]
    headers = ["", "run", "task", "method", "encoder sparsity", "parameters", "metric", "score", "dense", "speedup"]
    lines = [render_table(headers, rows)] if rows else []
    if rows:
        lines.append("* no other run of the task is as sparse and as good")
    lines += [f"unfinished: {name}" for name in unfinished]
    if plot is not None and points:
        _draw({task: [p for p in points if p.task == task] for task in tasks}, fronts, plot)
        lines.append(f"picture: {plot}")
    return "\n".join(lines)


def _draw(points: dict[str, list[Point]], fronts: dict[str, list[Point]], path: Path) -> None:
    """One panel a task: score against sparsity, one marker a method, the Pareto front as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(points), 4.5), layout="constrained")
    for axes, (task, of_task) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        front = fronts[task]
        axes.plot([p.sparsity for p in front], [p.score for p in front], color="#666666", linewidth=1, zorder=1)
        for marker, method in zip("os^Dv<>p", dict.fromkeys(p.method for p in of_task), strict=False):
            chosen = [p for p in of_task if p.method == method]
            axes.scatter([p.sparsity for p in chosen], [p.score for p in chosen], marker=marker, label=method, zorder=2)
        best = min if of_task[0].lower_is_better else max
        axes.axhline(best(p.dense for p in of_task), color="#333333", linestyle=(0, (4, 2)), linewidth=1, label="dense")
        axes.set(title=task, xlabel="encoder sparsity", ylabel=of_task[0].metric)
        axes.legend(frameon=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
