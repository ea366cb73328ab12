"""What a given teacher is worth, found once, before anybody learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsprune.engine.learning.evaluate import Forward, join_splits, predict
from dsprune.errors import ArchitectureError
from dsprune.files import read_json, write_json
from dsprune.run.context import RunContext
from dsprune.tasks.chance import below_chance, only_guesses

__all__ = ["GivenTeacher", "look_at_given_teacher", "recorded_teacher"]


@dataclass(frozen=True)
class GivenTeacher:
    """A teacher that somebody else trained.

    Attributes:
        path: as the recipe gives it.
        metrics: what it scored before pruning, by name.
    """

    path: str
    metrics: Mapping[str, float]


def recorded_teacher(context: RunContext) -> GivenTeacher | None:
    """What the run folder says of its given teacher; None where it was trained here, or not looked at yet."""
    record = context.folder.given_teacher
    if context.config.teacher.path is None or not record.exists():
        return None
    facts = read_json(record)
    if facts["settings"] != context.settings("teacher"):
        return None
    return GivenTeacher(facts["path"], facts["metrics"])


def look_at_given_teacher(context: RunContext, forward: Forward) -> None:
    """Score a given teacher, once, before anybody learns from it. Collective: all ranks must call.

    Args:
        context: of the run.
        forward: the teacher's answers.

    Raises:
        ArchitectureError: it does worse than chance, as `dsprune.tasks.chance` has it.
    """
    path = context.config.teacher.path
    if path is None or context.world.broadcast(recorded_teacher(context)) is not None:
        return
    given = GivenTeacher(path, _scores(context, forward, path))
    context.journal.forget_after("teacher", -1)
    context.journal.log("teacher", 0, {f"eval/{name}": value for name, value in given.metrics.items()})
    said = "  ".join(f"{name} {value:.4f}" for name, value in given.metrics.items())
    context.journal.say(f"teacher: given, {said}")
    if context.world.is_main:
        record = context.folder.given_teacher
        record.parent.mkdir(exist_ok=True)
        write_json(record, {**asdict(given), "settings": context.settings("teacher")})


def _scores(context: RunContext, forward: Forward, source: str) -> dict[str, float]:
    """Metrics of a teacher by name; a warning where it knows no more than one answer. Collective."""

    def check_stop() -> None:
        context.stop.check(context.world, "while scoring the teacher")

    task, scores = context.task, dict[str, Any]()
    for split, data in context.data.evals.items():
        batch_size = context.config.batch.eval
        outputs = predict(forward, data, context.world, batch_size=batch_size, before_batch=check_stop)
        scores[split] = task.score(outputs, data)
        reason = below_chance(task, outputs, data, scores[split], vocab_size=context.findings.vocab_size)
        if reason is not None:
            raise ArchitectureError(f"teacher '{source}' does worse than chance on {split}: {reason}")
        guess = only_guesses(task, outputs, data)
        if guess is not None:
            context.journal.say(
                f"warning: teacher '{source}' knows no more of {split} than one answer for all: {guess}"
            )
    return join_splits(scores)
