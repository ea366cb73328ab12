"""What a run is going to be, before it is: configuration, spaces, batch arithmetic, memory per rank."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dsprune.config import RunConfig
from dsprune.engine.checkpoints.store import BYTES_PER_PARAMETER, free_bytes
from dsprune.engine.models.count import count_teacher
from dsprune.engine.zero.config import calibration_config, precision, zero_stage
from dsprune.measure.inspection import describe_spaces
from dsprune.measure.tables import render_table
from dsprune.methods.evidence import cost_of
from dsprune.planning.forecast import GIB, STATE_HEADERS, state_cells
from dsprune.planning.states import engine_states
from dsprune.run.preflight import Preflight
from dsprune.structure import CostModel

__all__ = ["describe_plan"]

REHEARSAL = """\
A launch takes the first step of each of its training stages on two layers before any stage begins; a dry run, which
has neither ranks nor data, does not."""


def _batch_lines(config: RunConfig, findings: Preflight) -> list[str]:
    batch = findings.batch
    return [
        f"{batch.size} examples a step = {batch.world_size} rank(s) x {batch.micro} x {batch.accumulation} "
        "accumulation step(s)",
        f"sequences of at most {config.task.max_length} tokens: at most {batch.size * config.task.max_length} "
        "tokens a step",
    ]


def _memory_table(config: RunConfig, findings: Preflight, world_size: int) -> str:
    student = [math.prod(param.shape) for param in findings.structure.params.values()]
    teacher = [math.prod(shape) for shape in count_teacher(config, findings.task).shapes.values()]
    engines = [("student", student, findings.student_ds, True), ("teacher", teacher, findings.teacher_ds, False)]
    if not findings.trains_weights:
        engines.insert(1, ("student, pruned untrained", student, calibration_config(findings.student_ds), False))
    rows = []
    for name, sizes, ds_config, trained in engines:
        states = engine_states(sizes, ds_config, world_size, trained=trained)
        cells = [f"{sum(sizes):,}", f"ZeRO {zero_stage(ds_config)}", precision(ds_config), *state_cells(states)]
        rows.append([name, *cells])
    lines = [render_table(["engine", "weights", "stage", "dtype", *STATE_HEADERS], rows)]
    if config.teacher.path is not None:
        lines.append(f"student: {config.model.name}; teacher: {config.teacher.path}")
    return "\n".join(lines)


def _step_lines(config: RunConfig, findings: Preflight) -> list[str]:
    """What a step of the pruning stage is made of."""
    evidence, trains = findings.evidence, findings.trains_weights
    passes = "a training pass and what the method sees" if trains else "what the method sees, and nothing else"
    return [
        f"a step of '{config.method.name}': {passes}; it sees '{evidence}', which takes "
        f"{cost_of(evidence, trains_weights=trains)}",
        f"target: {findings.budget.target:.1%} of {findings.budget.describe()}",
    ]


def _disk_lines(config: RunConfig, findings: Preflight) -> list[str]:
    """What the checkpoints of a stage take: those kept, the best one, and the one being written."""
    size = BYTES_PER_PARAMETER * CostModel(findings.structure).dense("total") / GIB
    held = config.checkpoint.keep + 2
    free = free_bytes(Path(config.output)) / GIB
    return [
        f"a checkpoint every {config.checkpoint.every}: at most {size:.2f} GiB each, {held * size:.2f} GiB for the "
        f"{held} that can be there at once, {free:.2f} GiB free",
        "stopped by SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or a STOP file within a step or an evaluation batch, and a save",
    ]


def describe_plan(config: RunConfig, findings: Preflight, world_size: int) -> str:
    """The whole plan as text."""
    notes = dict.fromkeys((*findings.student_ds.notes, *findings.teacher_ds.notes))
    sections = {
        "configuration": json.dumps(config.model_dump(mode="json"), indent=2),
        "prunable spaces": describe_spaces(findings.structure),
        "batch": "\n".join(_batch_lines(config, findings)),
        "pruning": "\n".join(_step_lines(config, findings)),
        "checkpoints": "\n".join(_disk_lines(config, findings)),
        f"memory on {world_size} rank(s), activations apart": _memory_table(config, findings, world_size),
        "rehearsal": REHEARSAL,
    }
    if notes:
        sections["DeepSpeed configurations"] = "\n".join(notes)
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{body}" for title, body in sections.items())
