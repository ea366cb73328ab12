"""The latency table of a run: the one that its recipe names, or one that is measured now."""

from __future__ import annotations

import logging
from pathlib import Path

from dsprune.config import RunConfig
from dsprune.measure.latency.measure import measure_table
from dsprune.measure.latency.models import DenseModel
from dsprune.measure.latency.setting import Setting
from dsprune.structure.latency import Conditions, LatencyTable, ModelIdentity

__all__ = ["obtain_table", "setting_of"]

logger = logging.getLogger(__name__)


def setting_of(config: RunConfig) -> Setting:
    """Where and on what a run's speedup is counted: as the closing comparison measures it, unless `[latency]` says."""
    ours = config.latency
    return Setting(
        batch=ours.batch or config.eval.bench_batch,
        length=ours.length or config.eval.bench_length or config.task.max_length,
        dtype=ours.dtype,
        device=ours.device,
        threads=ours.threads,
        runtime=ours.runtime,
        minutes=ours.minutes,
    )


def obtain_table(config: RunConfig, dense: DenseModel, stored: Path, *, progress: bool = False) -> LatencyTable:
    """The table that a run is to count with. What is smoothed in it, and what is foreign in it, is said.

    Args:
        config: of the run.
        dense: its model, with the head of its task.
        stored: where a table that is measured is kept; the one that is there is taken if it is of this place.
        progress: show a bar on stderr.

    Raises:
        ConfigError: a table that cannot be read, has holes, or was not measured on this model in this place.
    """
    setting = setting_of(config)
    here = setting.conditions(setting.place())
    path = stored if config.latency.table is None else Path(config.latency.table)
    if config.latency.table is None:
        table = _kept(stored, dense, here) or measure_table(dense, setting, progress=progress)
        table.save(stored)
    else:
        table = LatencyTable.load(path)
        if config.latency.allow_foreign:
            table.check_model(dense.structure, path)
        else:
            table.check(dense.structure, here, path)
    foreign = [*table.model.differences(ModelIdentity.of(dense.structure)), *table.conditions.differences(here)]
    if foreign:
        logger.warning("latency table %s is foreign, and taken all the same: %s", path, "; ".join(foreign))
    for line in table.smoothed():
        logger.warning("latency table %s: smoothed: %s", path, line)
    return table


def _kept(stored: Path, dense: DenseModel, here: Conditions) -> LatencyTable | None:
    """The table that an earlier launch measured, if this is still its place; a job may go on elsewhere."""
    if not stored.exists():
        return None
    table = LatencyTable.load(stored)
    is_ours = table.model == ModelIdentity.of(dense.structure) and not table.conditions.differences(here)
    return table if is_ours else None
