"""A stage that is ready to train: from its newest checkpoint, if it has one, to the checkpoint that it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsprune.consolidate import read_manifest
from dsprune.engine.checkpoints.resume import Restored, check_drift, find_newest, restore
from dsprune.engine.checkpoints.store import CheckpointStore
from dsprune.engine.learning.trainer import Trainer
from dsprune.engine.zero.gather import release
from dsprune.methods.tracking import has_reached
from dsprune.run.context import RunContext
from dsprune.run.training.scoring import evaluation_gates, score_student
from dsprune.run.training.settling import settle
from dsprune.run.training.snapshots import Origin, Snapshots
from dsprune.run.training.training_loop import Pace, TrainingLoop
from dsprune.run_folder import STAGES, STATE, StageName

__all__ = ["StageTraining", "Trained"]


@dataclass(frozen=True)
class Trained:
    """What training left.

    Attributes:
        checkpoint: to be exported.
        metrics: of that checkpoint, by name.
    """

    checkpoint: Path
    metrics: Mapping[str, float]


class StageTraining:
    """One stage's training, resumed and to be resumed.

    Args:
        context: of the run.
        stage: that trains.
        trainer: does a step.
        origin: of the student's weights.
        keeps_best: where gates are learned, export the best checkpoint that reached the target, not the last.
    """

    def __init__(
        self, context: RunContext, stage: StageName, trainer: Trainer, origin: Origin, *, keeps_best: bool
    ) -> None:
        self.context = context
        self.stage = stage
        self.trainer = trainer
        self.keeps_best = keeps_best
        self.snapshots = Snapshots(context, stage, trainer, origin)
        self.store = CheckpointStore(
            context.folder.checkpoints(stage),
            stage,
            context.world,
            keep=context.config.checkpoint.keep,
            method=context.config.method.name if stage != "teacher" else None,
        )

    def run(self) -> Trained:
        """Train to the end of the stage. Collective: all ranks must call.

        Raises:
            Preempted: the run was asked to stop; a checkpoint of the last step is committed.
            NumericsError: nothing was saved over good state.
            ConfigError: settings are not those that the newest checkpoint was trained with.
        """
        loop = TrainingLoop(
            self.trainer,
            self.store,
            self.context.journal,
            self.context.status,
            self._pace(),
            competes=self._competes,
            evaluate=self._evaluate,
            score=self.context.task.merit,
            snapshot=self.snapshots.take,
        )
        loop.run(self._resume())
        best = STAGES[self.stage].exports == "best" or self.keeps_best
        chosen = self.context.world.broadcast(self.store.best() if best else self.store.newest())
        assert chosen is not None
        if self.keeps_best:
            self.context.journal.say(f"{self.stage}: exporting {chosen.name}, {self._why(chosen)}")
        return Trained(chosen, json.loads((chosen / STATE).read_text(encoding="utf-8"))["metrics"])

    def settle(self, trained: Trained) -> dict[str, Any]:
        """Say what landing on the target did, where gates were learned and had not come there. Collective.

        Returns:
            What the report repeats; empty where the checkpoint does not say.
        """
        return settle(
            self.trainer,
            trained.checkpoint,
            epsilon=self.context.config.prune.sparsity_epsilon,
            evaluate=lambda gates: score_student(self.context, self.trainer, gates, "the landed choice"),
            say=self.context.journal.say,
        )

    def release(self) -> None:
        """Free the engines of student and teacher."""
        release(self.trainer.engine, *([self.trainer.teacher.engine] if self.trainer.teacher else []))

    def _pace(self) -> Pace:
        config, per_epoch = self.context.config, self.context.batches.steps_per_epoch
        return Pace(
            evaluate=max(1, config.eval.every.steps(per_epoch)),
            save=max(1, config.checkpoint.every.steps(per_epoch)),
            log=config.log.every,
        )

    def _resume(self) -> Restored | None:
        config, say = self.context.config.checkpoint, self.context.journal.say
        newest = find_newest(self.store, config.resume, say)
        if newest is None:
            return None
        state = json.loads((newest / STATE).read_text(encoding="utf-8"))
        check_drift(state["settings"], self.snapshots.trained_with(), config.allow_drift, newest)
        return restore(newest, self.store, self.trainer.engine, self.trainer.replica, reshard=config.reshard, say=say)

    def _evaluate(self, done: int) -> dict[str, float]:
        scores = score_student(self.context, self.trainer, evaluation_gates(self.trainer, done), f"step {done}")
        journal = self.context.journal
        journal.log(self.stage, done, {f"eval/{name}": value for name, value in scores.items()})
        journal.say(f"{self.stage}: step {done}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        return scores

    def _competes(self, done: int) -> bool:
        """Whether a checkpoint of these steps is one of those that the best is picked from."""
        if self.trainer.replica is None:
            return True
        epsilon = self.context.config.prune.sparsity_epsilon
        return self.keeps_best and has_reached(self.trainer.replica.method, done, epsilon)

    def _why(self, checkpoint: Path) -> str:
        """Why this checkpoint is the one that is exported, of a stage that keeps its best."""
        if read_manifest(checkpoint)["score"] is None:
            epsilon = self.context.config.prune.sparsity_epsilon
            return f"the last one: no evaluation came within {epsilon:g} of the target"
        return "the best one at which the target was reached"
