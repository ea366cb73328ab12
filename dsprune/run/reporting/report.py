"""The closing report of a run: dense and compact side by side, measured in the same launch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from dsprune.run.context import RunContext
from dsprune.run.journal import read_metrics
from dsprune.run.preflight import bench_as_asked
from dsprune.run.training.given_teacher import recorded_teacher
from dsprune.run.training.settling import told
from dsprune.run_folder import StageName

__all__ = ["write_report"]


def _score(context: RunContext, source: str) -> dict[str, float]:
    """Metrics of a finished model folder, over all ranks. Collective."""
    model = Teacher(source, context.task, context.findings.teacher_ds)
    scores = evaluate_all(
        model.predict,
        context.task,
        context.data.evals,
        context.world,
        batch_size=context.config.batch.eval,
        before_batch=lambda: context.stop.check(context.world, "closing evaluation"),
    )
    release(model.engine)
    return scores


def _dense_models(context: RunContext) -> dict[str, ModelCount]:
    """What the compact model stands beside: one dense model, or the teacher and the base where they are two."""
    base, teacher = count_base(context.config, context.task), count_teacher(context.config, context.task)
    return {"dense": base} if teacher.shapes == base.shapes else {"teacher": teacher, "base": base}


def _sizes(folder: Path) -> dict[str, int]:
    """Exported parameters, encoder and total, as consolidation counted them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    counted: dict[str, int] = config["dsprune"]["parameters"]
    return {"encoder": counted["encoder"], "total": counted["total"]}


def _landing(context: RunContext) -> dict[str, Any]:
    """What was asked of pruning, and what its compact model has come to, before blocks went.

    That is the exact count of the choice that was exported, which consolidation found in what it wrote.
    """
    learned, budget = _learned(context, "prune"), context.findings.budget
    return {"of": budget.describe(), "target": budget.target, "measured": learned["after"], "learned": learned}


def _timed(context: RunContext, measured: float) -> dict[str, Any]:
    """Where a speedup was asked for: what was predicted, measured when units were chosen, and measured now.

    Args:
        context: of the run.
        measured: how many times as fast the last compact model is as the dense one that it was.
    """
    asked = context.config.prune.speedup
    if asked is None:
        return {}
    landed = context.folder.facts("prune").get("landing", {}).get("speedup")
    predicted = None if landed is None else landed["predicted"]
    return {"speedup": {"asked": asked, "predicted": predicted, "measured": measured, "landed": landed}}


def _learned(context: RunContext, stage: StageName) -> dict[str, Any]:
    """How far training brought the gates of a stage to their target, and what is to be said of it, if anything."""
    facts: dict[str, Any] = context.folder.facts(stage).get("landing", {})
    return {**facts, "told": told(facts)} if facts.get("missed") else facts


def _block_landing(context: RunContext, final: int, dense: int) -> dict[str, Any] | None:
    """The same for blocks, whose target is a share of what pruning left; None where none were removed."""
    if context.final_source == context.recovered_source:
        return None
    left = _sizes(context.recovered_source)["encoder"]
    return {
        "target": context.config.blocks.target,
        "measured": 1 - final / left,
        "together": 1 - final / dense,
        "learned": _learned(context, "blocks"),
    }


def _base_model(context: RunContext) -> PreTrainedModel:
    """The base under the task's head, with random weights: it was not fine-tuned, and its speed does not need it."""
    config = context.config.model
    labels = label_config(context.task)
    return from_config(context.task.head, read_model_config(config.name, config.revision, **labels))


def _bench(context: RunContext, kind: str, final: Path) -> BenchReport:
    """The compact model timed in turn with one of those that it stands beside."""
    dense = (context.config.model.name, _base_model(context)) if kind == "base" else context.teacher_source
    if context.config.prune.speedup is not None:
        return bench_as_asked(context.config, dense, final)
    return bench_models(
        dense,
        final,
        batch_sizes=[context.config.eval.bench_batch],
        length=context.config.eval.bench_length or context.config.task.max_length,
    )


def write_report(context: RunContext) -> None:
    """Evaluate and time dense and compact model, write report.json and report.png, print the table. Collective.

    The metric and the latency of a model come from the same folder. Where the teacher has other parameters than the
    model that is pruned, each is counted and timed for itself; sparsity is that of the latter.
    """
    final = context.final_source
    taught, compact = _score(context, context.teacher_source), _score(context, str(final))
    if not context.world.is_main:
        return
    beside = _dense_models(context)
    benches = {kind: _bench(context, kind, final) for kind in beside}
    figures = _figures(context, beside, {"taught": taught, "compact": compact}, benches)
    write_json(context.folder.report, figures)
    _plot(context, final)
    context.journal.say(render_report(figures, str(context.folder), str(final)))


def _figures(
    context: RunContext, beside: Mapping[str, ModelCount], scores: Mapping[str, Any], benches: Mapping[str, BenchReport]
) -> dict[str, Any]:
    rows = {kind: bench.rows[0] for kind, bench in benches.items()}
    base = beside.get("base") or beside["dense"]
    sizes = _sizes(context.final_source)
    given = recorded_teacher(context)
    models = {
        kind: {
            "source": context.config.model.name if kind == "base" else context.teacher_source,
            "metrics": {} if kind == "base" else scores["taught"],
            "parameters": count.parameters,
            "latency_ms": rows[kind].dense_ms,
        }
        for kind, count in beside.items()
    }
    first = next(iter(benches))
    compact = {
        "source": str(context.final_source),
        "metrics": scores["compact"],
        "parameters": sizes,
        "sparsity": {of: 1 - sizes[of] / base.parameters[of] for of in sizes},
        "latency_ms": rows[first].compact_ms,
        "speedup": {kind: row.speedup for kind, row in rows.items()},
    }
    return {
        "task": context.task.name,
        "splits": list(context.data.evals),
        "lower_is_better": context.task.lower_is_better,
        "notes": list(context.data.notes),
        "landing": _landing(context) | _timed(context, rows[next(reversed(rows))].speedup),
        "blocks": _block_landing(context, sizes["encoder"], base.encoder),
        "given_teacher": asdict(given) if given is not None else None,
        **models,
        "compact": compact,
        "bench": benches[first].to_dict(),
        **({"bench_base": benches["base"].to_dict()} if "base" in benches else {}),
    }


def _plot(context: RunContext, final: Path) -> None:
    config = json.loads((final / "config.json").read_text(encoding="utf-8"))["dsprune"]
    sizes = context.findings.structure.sizes
    layers = [{"heads": 0, "ffn_dim": 0} for _ in range(sizes.num_layers)]
    for layer in config["layers"]:
        layers[layer["source"]] = {"heads": layer["heads"], "ffn_dim": layer["ffn_dim"]}
    plot_run(
        read_metrics(context.folder),
        layers,
        {"heads": sizes.num_groups, "ffn_dim": sizes.ffn_dim},
        context.folder.picture,
        metric=context.task.primary,
        title=f"{context.config.model.name} on {context.task.name}: {context.config.method.name}, "
        f"target {context.findings.budget.goal}",
    )
