"""A run that is held to a speedup: the table that it counts with, and how fast a choice of units is as measured."""

from __future__ import annotations

from dataclasses import replace

from dsprune.config import RunConfig
from dsprune.dtypes import torch_dtype
from dsprune.engine.ranks.world import World
from dsprune.measure.bench import BenchReport, bench_models
from dsprune.measure.latency.models import DenseModel
from dsprune.measure.latency.obtain import obtain_table, setting_of
from dsprune.run.preflight.checking import Preflight, build_method, dense_skeleton
from dsprune.run_folder import RunFolder
from dsprune.structure import Selection
from dsprune.structure.latency import LatencyTable
from dsprune.tasks import Task

__all__ = ["bench_as_asked", "dense_model", "hold_to_time", "measure_speedup"]


def dense_model(config: RunConfig, task: Task) -> DenseModel:
    """What is pruned, with the head of its task and without weights."""
    model = dense_skeleton(config, task)
    return DenseModel.of(model.config.to_dict() | {"architectures": [type(model).__name__]})


def hold_to_time(config: RunConfig, findings: Preflight, world: World) -> Preflight:
    """What was found good, with the latency table and the budget of it, where a speedup is asked for. Collective.

    Rank 0 has the table: kept in the run folder, given, or measured now. All ranks count with the same.

    Raises:
        ConfigError: the table cannot be used, or the speedup is out of reach.
    """
    speedup, folder = config.prune.speedup, RunFolder(config.output)
    if speedup is None or not set(config.stages) - {"teacher"}:
        return findings
    found: LatencyTable | None = None
    with world.together("measuring latency"):
        if world.is_main:
            if folder.is_done("prune", config.model_dump(mode="json")) and folder.latency_table.exists():
                found = LatencyTable.load(folder.latency_table)
            else:
                found = obtain_table(
                    config, dense_model(config, findings.task), folder.latency_table, progress=world.is_main
                )
                found.save(folder.latency_table)
    told = world.broadcast(found.model_dump() if found is not None else None, "sharing the latency table")
    table = LatencyTable.model_validate(told)
    method = build_method(config, findings.structure, total_steps=0, steps_per_epoch=0, table=table)
    return replace(findings, latency=table, budget=method.budget)


def bench_as_asked(config: RunConfig, dense: object, compact: object) -> BenchReport:
    """Two models timed in turn, on what the run's speedup is counted on.

    Args:
        config: of the run.
        dense: model folder, hub id, or a model in memory and its name.
        compact: likewise.
    """
    setting = setting_of(config)
    return bench_models(
        dense,  # type: ignore[arg-type]
        compact,  # type: ignore[arg-type]
        batch_sizes=[setting.batch],
        length=setting.length,
        dtype=setting.dtype,
        device=setting.device,
        threads=setting.threads,
    )


def measure_speedup(config: RunConfig, dense: DenseModel, selection: Selection) -> float:
    """How many times as fast as the dense model the compact one of a choice is, here and now.

    Both have random weights, which time does not depend on.
    """
    setting = setting_of(config)
    place = setting.place(), torch_dtype(setting.dtype)
    report = bench_as_asked(config, ("dense", dense.whole(*place)), ("candidate", dense.compact(selection, *place)))
    return report.rows[0].speedup
