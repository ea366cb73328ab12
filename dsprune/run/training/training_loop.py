"""A training stage from its first step, or its newest checkpoint, to its last: train, log, evaluate, save, stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsprune.engine.checkpoints.resume import Restored
from dsprune.engine.checkpoints.store import CheckpointStore, Snapshot
from dsprune.engine.learning.commit_guard import check_before_commit
from dsprune.engine.learning.trainer import Trainer
from dsprune.engine.ranks.pulse import pulse
from dsprune.errors import NumericsError, Preempted
from dsprune.files import write_json
from dsprune.methods.tracking import report_lag
from dsprune.run.journal import Journal
from dsprune.run.status import Status
from dsprune.run.training.metering import Meter, log_step

__all__ = ["Pace", "TrainingLoop"]


@dataclass(frozen=True)
class Pace:
    """Optimizer steps between two evaluations, saves and log lines."""

    evaluate: int
    save: int
    log: int


class TrainingLoop:
    """Runs the steps of one stage.

    Args:
        trainer: does a step.
        store: of the stage's checkpoints.
        journal: of the run.
        status: of the run.
        pace: how often what is done.
        competes: whether a checkpoint after so many steps competes by score: then there is one wherever there is a
            score.
        evaluate: metrics after so many steps; may raise `Preempted`.
        score: the one number of them that checkpoints compete by.
        snapshot: what to save beside the engine, given steps done, metrics, score and the loop's own state.
    """

    def __init__(
        self,
        trainer: Trainer,
        store: CheckpointStore,
        journal: Journal,
        status: Status,
        pace: Pace,
        *,
        competes: Callable[[int], bool],
        evaluate: Callable[[int], dict[str, float]],
        score: Callable[[Mapping[str, float]], float],
        snapshot: Callable[[int, dict[str, float], float | None, dict[str, Any]], Snapshot],
    ) -> None:
        self.trainer = trainer
        self.store = store
        self.journal = journal
        self.status = status
        self.pace = pace
        self.competes = competes
        self.evaluate = evaluate
        self.score = score
        self.snapshot = snapshot
        self.meter = Meter()
        self.scores: dict[str, float] = {}

    def run(self, restored: Restored | None) -> None:
        """Train to the end of the stage. Collective: all ranks must call.

        Args:
            restored: where to go on from; None begins at step 0.

        Raises:
            Preempted: the run was asked to stop; a checkpoint of the last step is committed.
            NumericsError: nothing was saved over good state.
        """
        begin, total = self._take_up(restored), self.trainer.total_steps
        self.status.stage, self.status.step = self.trainer.stage, begin
        pulse.at(stage=self.trainer.stage, step=begin, phase="starting")
        self.status.write("running")
        self.journal.start_bar(self.trainer.stage, total, begin)
        if restored is not None and not restored.state["evaluated"]:
            self._conclude(begin, None)
        for step in range(begin, total):
            self._conclude(step + 1, self._step(step))
        self.journal.end_bar()

    def _take_up(self, restored: Restored | None) -> int:
        if restored is None:
            self.journal.forget_after(self.trainer.stage, 0)
            return 0
        state = restored.state
        if self.trainer.matcher is not None:
            self.trainer.matcher.distances = restored.tensors.get("distances")
        self.trainer.skipped = int(state["skipped"])
        self.meter.restore(state["meter"])
        self.scores = dict(state["metrics"])
        self.journal.forget_after(self.trainer.stage, int(state["step"]))
        self.journal.say(f"{self.trainer.stage}: going on from step {state['step']}")
        return int(state["step"])

    def _step(self, step: int) -> str | None:
        """One optimizer step and its line of metrics; returns why to stop, if anybody asked."""
        try:
            result = self.trainer.step(step)
        except NumericsError as error:
            raise self._told(error) from error
        self.meter.add(result, self.trainer.batches.num_tokens(step))
        done, note = step + 1, None
        if done % self.pace.log == 0 or done == self.trainer.total_steps:
            note = log_step(self.journal, self.trainer, self.meter, done)
        self.journal.advance(note)
        if (lag := self._lag(done)) is not None:
            self.journal.say(f"warning: {self.trainer.stage} step {done}: {lag}")
        self.status.step = done
        pulse.at(step=done, phase="between steps")
        return result.stop

    def _lag(self, done: int) -> str | None:
        """What is to be said of gates that do not follow their target."""
        return None if self.trainer.replica is None else report_lag(self.trainer.replica.method, done)

    def _conclude(self, done: int, stop: str | None) -> None:
        """What follows a step: evaluate, save, stop."""
        last = done == self.trainer.total_steps
        fresh = done % self.pace.evaluate == 0 or last
        where = f"{self.trainer.stage} step {done}"
        if stop is not None:
            self._save(done, evaluated=not fresh)
            raise Preempted(f"{where}: stopped by {stop}, saved; start the same command again to go on")
        if fresh:
            try:
                self.scores = self.evaluate(done)
            except Preempted:
                self._save(done, evaluated=False)
                raise
        scored = fresh and self.competes(done)
        if done % self.pace.save == 0 or last or scored:
            self._save(done, evaluated=True, score=self.score(self.scores) if scored else None)
            if not last:
                self.trainer.stop.check(self.trainer.world, f"{where}, saved")

    def _save(self, done: int, *, evaluated: bool, score: float | None = None) -> None:
        trainer = self.trainer
        pulse.at(phase="saving")
        try:
            check_before_commit(trainer, done)
        except NumericsError as error:
            raise self._told(error) from error
        own = {"evaluated": evaluated, "skipped": trainer.skipped, "meter": self.meter.state()}
        self.store.save(trainer.engine, self.snapshot(done, self.scores, score, own), trainer.replica)
        self.status.write("running")

    def _told(self, error: NumericsError) -> NumericsError:
        """An error of numerics with the place to go back to; its details stand in numerics.json of the run."""
        newest = self.store.newest()
        place = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        if self.status.active and error.details:
            write_json(self.status.folder.numerics, error.details)
        return NumericsError(f"{error}; nothing was saved, {place}", error.details)
