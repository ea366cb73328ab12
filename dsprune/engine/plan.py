"""What a run is going to be, before it is: configuration, spaces, batch arithmetic, memory per rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsprune.config import RunConfig
from dsprune.engine.checkpoint import BYTES_PER_PARAMETER, free_bytes
from dsprune.engine.ds_config import precision, zero_stage
from dsprune.engine.preflight import Preflight
from dsprune.measure.inspection import describe_spaces
from dsprune.measure.tables import render_table
from dsprune.structure import CostModel

__all__ = ["describe_plan", "estimate_memory"]

GIB = 2**30


def estimate_memory(parameters: int, ds_config: dict[str, Any], world_size: int, *, trained: bool) -> dict[str, float]:
    """Bytes per rank of parameters, gradients and optimizer state under a ZeRO stage; activations not counted.

    Mixed precision keeps fp32 masters beside 2-byte weights and gradients; AdamW keeps two fp32 moments.
    ZeRO 1 shards optimizer state, 2 gradients as well, 3 parameters as well (Rajbhandari et al. 2020, table 1).
    """
    stage = zero_stage(ds_config)
    width = 4 if precision(ds_config) == "fp32" else 2
    master = 0 if width == 4 else 4
    share = {level: (1 / world_size if stage >= level else 1.0) for level in (1, 2, 3)}
    sizes = {"parameters": parameters * width * share[3]}
    if trained:
        sizes["gradients"] = parameters * width * share[2]
        sizes["optimizer"] = parameters * (8 + master) * share[1]
    return sizes


def _batch_lines(config: RunConfig, ready: Preflight) -> list[str]:
    batch = ready.batch
    return [
        f"{batch.size} examples a step = {batch.world_size} rank(s) x {batch.micro} x {batch.accumulation} "
        "accumulation step(s)",
        f"sequences of at most {config.task.max_length} tokens: at most {batch.size * config.task.max_length} "
        "tokens a step",
    ]


def _memory_table(ready: Preflight, world_size: int) -> str:
    parameters = CostModel(ready.structure).dense("total")
    student = estimate_memory(parameters, ready.student_ds, world_size, trained=True)
    teacher = estimate_memory(parameters, ready.teacher_ds, world_size, trained=False)
    rows = []
    for name, ds_config, sizes in (
        ("student", ready.student_ds, student),
        ("teacher", ready.teacher_ds, teacher),
    ):
        parts = [f"{sizes.get(part, 0) / GIB:.3f}" for part in ("parameters", "gradients", "optimizer")]
        total = f"{sum(sizes.values()) / GIB:.3f}"
        rows.append([name, f"ZeRO {zero_stage(ds_config)}", precision(ds_config), *parts, total])
    return render_table(["engine", "stage", "dtype", "parameters", "gradients", "optimizer", "GiB per rank"], rows)


def _disk_lines(config: RunConfig, ready: Preflight) -> list[str]:
    """What the checkpoints of a stage take: those kept, the best one, and the one being written."""
    size = BYTES_PER_PARAMETER * CostModel(ready.structure).dense("total") / GIB
    held = config.checkpoint.keep + 2
    free = free_bytes(Path(config.output)) / GIB
    return [
        f"a checkpoint every {config.checkpoint.every}: at most {size:.2f} GiB each, {held * size:.2f} GiB for the "
        f"{held} that can be there at once, {free:.2f} GiB free",
        "stopped by SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or a STOP file within a step or an evaluation batch, and a save",
    ]


def describe_plan(config: RunConfig, ready: Preflight, world_size: int) -> str:
    """The whole plan as text."""
    sections = {
        "configuration": json.dumps(config.model_dump(mode="json"), indent=2),
        "prunable spaces": describe_spaces(ready.structure),
        "batch": "\n".join(_batch_lines(config, ready)),
        "checkpoints": "\n".join(_disk_lines(config, ready)),
        f"memory on {world_size} rank(s), activations apart": _memory_table(ready, world_size),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{body}" for title, body in sections.items())
