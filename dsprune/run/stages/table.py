"""Which class does which stage, and how one is run."""

from __future__ import annotations

import time
from collections.abc import Mapping

from dsprune.engine.ranks.pulse import pulse
from dsprune.run.context import RunContext
from dsprune.run.stages.base import Stage, TrainingStage
from dsprune.run.stages.blocks import BlocksStage
from dsprune.run.stages.consolidate import ConsolidateStage
from dsprune.run.stages.evaluate import EvaluateStage
from dsprune.run.stages.prune import PruneStage
from dsprune.run.stages.recover import RecoverStage
from dsprune.run.stages.teacher import TeacherStage
from dsprune.run_folder import StageName

__all__ = ["STAGE_CLASSES", "TRAINING_CLASSES", "run_stage"]

TRAINING_CLASSES: Mapping[StageName, type[TrainingStage]] = {
    "teacher": TeacherStage,
    "prune": PruneStage,
    "recover": RecoverStage,
    "blocks": BlocksStage,
}
"""Stages that train."""
STAGE_CLASSES: Mapping[StageName, type[Stage]] = {
    **TRAINING_CLASSES,
    "consolidate": ConsolidateStage,
    "evaluate": EvaluateStage,
}
"""All stages."""


def run_stage(context: RunContext, name: StageName) -> None:
    """Run one stage, or say that it is finished. Collective: all ranks must call.

    Raises:
        ConfigError: it was finished with other settings; other errors as the stage has them.
    """
    if context.is_done(name):
        context.journal.say(f"{name}: already finished in {context.folder}")
        return
    context.status.stage, context.status.step = name, 0
    context.status.write("running")
    pulse.at(stage=name, step=0, phase="starting")
    context.stop.check(context.world, f"before stage '{name}'")
    began = time.perf_counter()
    STAGE_CLASSES[name](context).run()
    context.journal.say(f"{name}: finished in {time.perf_counter() - began:.0f} s")
