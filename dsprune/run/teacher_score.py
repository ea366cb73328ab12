"""What a given teacher is worth, before anybody learns from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dsprune.engine.learning.evaluate import BeforeBatch, join_splits, predict
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.ranks.world import World
from dsprune.errors import ArchitectureError
from dsprune.tasks import Encoded, Task
from dsprune.tasks.chance import below_chance, only_guesses

__all__ = ["score_teacher"]


def score_teacher(
    teacher: Teacher,
    source: str,
    task: Task,
    evals: Mapping[str, Encoded],
    world: World,
    *,
    batch_size: int,
    vocab_size: int,
    before_batch: BeforeBatch,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Metrics of a teacher that somebody else trained. Collective: all ranks must call.

    Args:
        teacher: whose hidden states and maps nobody takes meanwhile.
        source: of it, for what is said.
        task: that it is to teach.
        evals: splits to evaluate on.
        world: the ranks.
        batch_size: examples of an evaluation batch of one rank.
        vocab_size: of the teacher.
        before_batch: called before every batch.
        say: told where it knows no more than one answer.

    Raises:
        ArchitectureError: it does worse than chance, as `dsprune.tasks.chance` has it.
    """

    def forward(inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        outputs = teacher.predict(inputs, labels)
        teacher.let_go()
        return outputs

    scores: dict[str, Any] = {}
    for split, data in evals.items():
        outputs = predict(forward, data, world, batch_size=batch_size, before_batch=before_batch)
        scores[split] = task.score(outputs, data)
        reason = below_chance(task, outputs, data, scores[split], vocab_size=vocab_size)
        if reason is not None:
            raise ArchitectureError(f"teacher '{source}' does worse than chance on {split}: {reason}")
        guess = only_guesses(task, outputs, data)
        if guess is not None:
            say(f"warning: teacher '{source}' knows no more of {split} than one answer for all: {guess}")
    return join_splits(scores)
