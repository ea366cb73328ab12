"""The closing report of a run: dense and compact side by side, measured in the same launch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from dsprune.engine.learning.evaluate import evaluate_all
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.models.count import ModelCount, count_base, count_teacher
from dsprune.engine.models.load import from_config, label_config
from dsprune.engine.zero.gather import release
from dsprune.files import write_json
from dsprune.measure.bench import BenchReport, bench_models
from dsprune.measure.plots import plot_run
from dsprune.measure.summary import render_report
from dsprune.pretrained import read_model_config
from dsprune.run.journal import read_metrics
from dsprune.run.settling import told
from dsprune.run_folder import StageName

if TYPE_CHECKING:
    from dsprune.run.run import Run

__all__ = ["write_report"]


def _score(run: Run, source: str) -> dict[str, float]:
    """Metrics of a finished model folder, over all ranks. Collective."""
    model = Teacher(source, run.task, run.ready.teacher_ds)
    scores = evaluate_all(
        model.predict,
        run.task,
        run.data.evals,
        run.world,
        batch_size=run.config.batch.eval,
        before_batch=lambda: run.stop.check(run.world, "closing evaluation"),
    )
    release(model.engine)
    return scores


def _dense_models(run: Run) -> dict[str, ModelCount]:
    """What the compact model stands beside: one dense model, or the teacher and the base where they are two."""
    base, teacher = count_base(run.config, run.task), count_teacher(run.config, run.task)
    return {"dense": base} if teacher.shapes == base.shapes else {"teacher": teacher, "base": base}


def _sizes(run: Run, folder: Path) -> dict[str, int]:
    """Exported parameters, encoder and total, as consolidation counted them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    counted: dict[str, int] = config["dsprune"]["parameters"]
    return {"encoder": counted["encoder"], "total": counted["total"]}


def _landing(run: Run, base: ModelCount) -> dict[str, Any]:
    """What was asked of pruning, and what its compact model measures, before blocks went."""
    of = run.config.prune.target_of
    measured = 1 - _sizes(run, run.recovered_source)[of] / base.parameters[of]
    return {"of": of, "target": run.ready.target, "measured": measured, "learned": _learned(run, "prune")}


def _learned(run: Run, stage: StageName) -> dict[str, Any]:
    """How far training brought the gates of a stage to their target, and what is to be said of it, if anything."""
    facts = run.landing(stage)
    return {**facts, "told": told(facts)} if facts.get("missed") else facts


def _block_landing(run: Run, final: int, dense: int) -> dict[str, Any] | None:
    """The same for blocks, whose target is a share of what pruning left; None where none were removed."""
    if run.final_source == run.recovered_source:
        return None
    left = _sizes(run, run.recovered_source)["encoder"]
    return {
        "target": run.config.blocks.target,
        "measured": 1 - final / left,
        "together": 1 - final / dense,
        "learned": _learned(run, "blocks"),
    }


def _base_model(run: Run) -> PreTrainedModel:
    """The base under the task's head, with random weights: it was not fine-tuned, and its speed does not need it."""
    config = run.config.model
    return from_config(run.task.head, read_model_config(config.name, config.revision, **label_config(run.task)))


def _bench(run: Run, kind: str, final: Path) -> BenchReport:
    """The compact model timed in turn with one of those that it stands beside."""
    return bench_models(
        (run.config.model.name, _base_model(run)) if kind == "base" else run.teacher_source,
        final,
        batch_sizes=[run.config.eval.bench_batch],
        length=run.config.eval.bench_length or run.config.task.max_length,
    )


def write_report(run: Run) -> None:
    """Evaluate and time dense and compact model, write report.json and report.png, print the table. Collective.

    The metric and the latency of a model come from the same folder. Where the teacher has other parameters than the
    model that is pruned, each is counted and timed for itself; sparsity is that of the latter.
    """
    final = run.final_source
    taught, compact = _score(run, run.teacher_source), _score(run, str(final))
    if not run.world.is_main:
        return
    beside = _dense_models(run)
    benches = {kind: _bench(run, kind, final) for kind in beside}
    figures = _figures(run, beside, {"taught": taught, "compact": compact}, benches)
    write_json(run.folder.report, figures)
    _plot(run, final)
    run.journal.say(render_report(figures, str(run.folder), str(final)))


def _figures(
    run: Run, beside: Mapping[str, ModelCount], scores: Mapping[str, Any], benches: Mapping[str, BenchReport]
) -> dict[str, Any]:
    rows = {kind: bench.rows[0] for kind, bench in benches.items()}
    base = beside.get("base") or beside["dense"]
    sizes = _sizes(run, run.final_source)
    models = {
        kind: {
            "source": run.config.model.name if kind == "base" else run.teacher_source,
            "metrics": {} if kind == "base" else scores["taught"],
            "parameters": count.parameters,
            "latency_ms": rows[kind].dense_ms,
        }
        for kind, count in beside.items()
    }
    first = next(iter(benches))
    compact = {
        "source": str(run.final_source),
        "metrics": scores["compact"],
        "parameters": sizes,
        "sparsity": {of: 1 - sizes[of] / base.parameters[of] for of in sizes},
        "latency_ms": rows[first].compact_ms,
        "speedup": {kind: row.speedup for kind, row in rows.items()},
    }
    return {
        "task": run.task.name,
        "splits": list(run.data.evals),
        "lower_is_better": run.task.lower_is_better,
        "notes": list(run.data.notes),
        "landing": _landing(run, base),
        "blocks": _block_landing(run, sizes["encoder"], base.encoder),
        "given_teacher": run.given_teacher(),
        **models,
        "compact": compact,
        "bench": benches[first].to_dict(),
        **({"bench_base": benches["base"].to_dict()} if "base" in benches else {}),
    }


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
        run.folder.picture,
        metric=run.task.primary,
        title=f"{run.config.model.name} on {run.task.name}: {run.config.method.name}, "
        f"target {run.ready.target:.0%} of the {run.config.prune.target_of}",
    )
