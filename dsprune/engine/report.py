"""The closing report of a run: dense and compact side by side, measured in the same launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsprune.engine.evaluate import evaluate_all
from dsprune.engine.journal import read_metrics, write_json
from dsprune.engine.models import release
from dsprune.engine.teacher import Teacher
from dsprune.measure.bench import BenchReport, bench_models
from dsprune.measure.plots import plot_run
from dsprune.measure.tables import render_table
from dsprune.structure import CostModel

if TYPE_CHECKING:
    from dsprune.engine.stages import Run

__all__ = ["write_report"]

TOLERANCE = 0.005
"""How far the exported sparsity may be from the target before the report says so."""


def _score(run: Run, source: str) -> dict[str, float]:
    """Metrics of a finished model folder, over all ranks. Collective."""
    model = Teacher(source, run.task, run.ready.teacher_ds)
    scores = evaluate_all(
        model.predict,
        run.task,
        run.data.evals,
        run.world,
        batch_size=run.config.batch.eval,
        pulse=lambda: run.stop.check(run.world, "closing evaluation"),
    )
    release(model.engine)
    return scores


def _sizes(run: Run, folder: Path) -> dict[str, int]:
    """Exported parameters, encoder and total, as consolidation counted them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    counted: dict[str, int] = config["dsprune"]["parameters"]
    return {"encoder": counted["encoder"], "total": counted["total"]}


def _landing(run: Run, dense: dict[str, int]) -> dict[str, Any]:
    """What was asked of pruning, and what its compact model measures, before blocks went."""
    of = run.config.prune.target_of
    measured = 1 - _sizes(run, run.recovered_source)[of] / dense[of]
    return {"of": of, "target": run.ready.target, "measured": measured}


def _block_landing(run: Run, final: int, dense: int) -> dict[str, Any] | None:
    """The same for blocks, whose target is a share of what pruning left; None where none were removed."""
    if run.final_source == run.recovered_source:
        return None
    left = _sizes(run, run.recovered_source)["encoder"]
    return {"target": run.config.blocks.target, "measured": 1 - final / left, "together": 1 - final / dense}


def _rows(figures: dict[str, Any]) -> list[list[str]]:
    names = list(figures["dense"]["metrics"])
    rows = []
    for kind in ("dense", "compact"):
        entry = figures[kind]
        rows.append(
            [
                kind,
                *(f"{entry['metrics'][name]:.4f}" for name in names),
                f"{entry['parameters']['encoder']:,}",
                f"{entry['parameters']['total']:,}",
                f"{entry['sparsity']['encoder']:.1%}",
                f"{entry['sparsity']['total']:.1%}",
                f"{entry['latency_ms']:.2f}",
                _speedup(figures["dense"]["latency_ms"] / entry["latency_ms"]),
            ]
        )
    return rows


def _speedup(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 1 else f"{ratio:.2f}x (slower)"


def _headers(figures: dict[str, Any]) -> list[str]:
    metrics = list(figures["dense"]["metrics"])
    sizes = ["encoder params", "total params", "encoder sparsity", "total sparsity"]
    return ["model", *metrics, *sizes, "latency ms", "speedup"]


def write_report(run: Run) -> None:
    """Evaluate and time dense and compact model, write report.json and report.png, print the table. Collective.

    The metric and the latency of a model come from the same folder.
    """
    teacher, final = run.teacher_source, run.final_source
    scores = {"dense": _score(run, teacher), "compact": _score(run, str(final))}
    if not run.world.is_main:
        return
    cost = CostModel(run.ready.structure)
    dense = {"encoder": cost.dense("encoder"), "total": cost.dense("total")}
    sizes = {"dense": dense, "compact": _sizes(run, final)}
    bench = bench_models(
        teacher,
        final,
        batch_sizes=[run.config.eval.bench_batch],
        length=run.config.eval.bench_length or run.config.task.max_length,
    )
    figures = _figures(run, scores, sizes, bench)
    write_json(run.folder / "report.json", figures)
    _plot(run, final)
    run.journal.say(_text(run, figures, bench, final))


def _figures(run: Run, scores: dict[str, Any], sizes: dict[str, Any], bench: BenchReport) -> dict[str, Any]:
    row = bench.rows[0]
    latency = {"dense": row.dense_ms, "compact": row.compact_ms}
    dense = sizes["dense"]
    models = {
        kind: {
            "metrics": scores[kind],
            "parameters": sizes[kind],
            "sparsity": {of: 1 - sizes[kind][of] / dense[of] for of in dense},
            "latency_ms": latency[kind],
        }
        for kind in ("dense", "compact")
    }
    return {
        "task": run.task.name,
        "splits": list(run.data.evals),
        "lower_is_better": run.task.lower_is_better,
        "notes": list(run.data.notes),
        "landing": _landing(run, dense),
        "blocks": _block_landing(run, sizes["compact"]["encoder"], dense["encoder"]),
        "given_teacher": run.given_teacher(),
        **models,
        "bench": bench.to_dict(),
    }


def _text(run: Run, figures: dict[str, Any], bench: BenchReport, final: Path) -> str:
    row = bench.rows[0]
    landing = figures["landing"]
    lines = [
        "",
        render_table(_headers(figures), _rows(figures)),
        f"latency: median of {bench.runs} alternating runs, batch {row.batch_size}, length {bench.length}, "
        f"{bench.dtype}, {bench.device}",
        f"target: {landing['target']:.1%} of the {landing['of']}, exported: {landing['measured']:.2%}",
    ]
    if abs(landing["measured"] - landing["target"]) > TOLERANCE:
        lines.append(
            f"the target was missed by {100 * abs(landing['measured'] - landing['target']):.1f} points: the units of "
            f"this model are coarser than that, or pruning was too short for the target (see {run.folder}/report.png)"
        )
    if (blocks := figures["blocks"]) is not None:
        lines.append(
            f"blocks: {blocks['target']:.1%} of the encoder that was left, exported: {blocks['measured']:.2%}; "
            f"together {blocks['together']:.2%} of the dense encoder"
        )
    if (given := figures["given_teacher"]) is not None:
        scores = "  ".join(f"{name} {value:.4f}" for name, value in given["metrics"].items())
        lines.append(f"teacher, as it was given: {scores} ({given['path']})")
    lines += [f"note: {note}" for note in run.data.notes]
    lines.append(f"model: {final}   report: {run.folder}/report.json, {run.folder}/report.png")
    return "\n".join(lines)


def _plot(run: Run, final: Path) -> None:
    config = json.loads((final / "config.json").read_text(encoding="utf-8"))["dsprune"]
    sizes = run.ready.structure.sizes
    layers = [{"heads": 0, "ffn_dim": 0} for _ in range(sizes.num_layers)]
    for layer in config["layers"]:
        layers[layer["source"]] = {"heads": layer["heads"], "ffn_dim": layer["ffn_dim"]}
    plot_run(
        read_metrics(run.folder),
        layers,
        {"heads": sizes.num_groups, "ffn_dim": sizes.ffn_dim},
        run.folder / "report.png",
        title=f"{run.config.model.name} on {run.task.name}: {run.config.method.name}, "
        f"target {run.ready.target:.0%} of the {run.config.prune.target_of}",
    )
