"""What a student answers, and scores, under some gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsprune.consolidate import verify
from dsprune.engine.learning.evaluate import Forward, evaluate_all
from dsprune.engine.learning.trainer import Trainer
from dsprune.run.context import RunContext
from dsprune.structure import Gates

__all__ = ["answering", "evaluation_gates", "model_logits", "score_student"]


def evaluation_gates(trainer: Trainer, done: int) -> Gates | None:
    """Gates that a student is evaluated with after so many steps; None is the model as it is."""
    return trainer.replica.method.evaluation_gates(done) if trainer.replica else None


def answering(trainer: Trainer, gates: Mapping[str, Tensor] | None) -> Forward:
    """The student as a function of inputs and labels. Calling that is collective under ZeRO-3.

    Args:
        trainer: of the student.
        gates: that it answers under; None is the model as it is.
    """
    engine = trainer.engine
    engine.eval()
    on_device = _on_device(trainer, gates)
    return lambda inputs, labels: engine(inputs, labels, None, on_device)[0]  # type: ignore[no-any-return]


def score_student(
    context: RunContext, trainer: Trainer, gates: Mapping[str, Tensor] | None, what: str
) -> dict[str, float]:
    """Metrics of the student under some gates, by name. Collective: all ranks must call.

    Args:
        context: of the run.
        trainer: of the student.
        gates: that it answers under; None is the model as it is.
        what: is scored, for whoever stops the run meanwhile.

    Raises:
        Preempted: the run was asked to stop.
    """
    return evaluate_all(
        answering(trainer, gates),
        context.task,
        context.data.evals,
        context.world,
        batch_size=context.config.batch.eval,
        before_batch=lambda: context.stop.check(context.world, f"{trainer.stage} {what}, while evaluating, saved"),
    )


def model_logits(trainer: Trainer, batch: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None) -> Tensor:
    """What the engine itself says, now, with the final gates: the export has to say the same. Collective.

    Taken from the live engine, it rests on nothing that was written.

    Args:
        trainer: of the student.
        batch: arguments of the model.
        gates: of the choice that is exported; None is the model as it is.
    """
    inputs = {name: tensor.to(trainer.world.device) for name, tensor in verify.shortened(batch).items()}
    engine: Any = trainer.engine
    engine.eval()
    with torch.no_grad():
        return verify.sample(engine(inputs, None, None, _on_device(trainer, gates), bare=True)[0])


def _on_device(trainer: Trainer, gates: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if gates is None else {kind: gate.to(trainer.world.device) for kind, gate in gates.items()}
