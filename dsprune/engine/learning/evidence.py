"""Serves what a method wants to see of a step: passes beside the training pass, or instead of it.

A second backward pass through the graph of the training pass would break ZeRO's hooks; a pass that differentiates the
gates alone reaches no parameter, so that no stage takes notice. Every rank has as many examples in a step as every
other, and every example is as many passes, so that the collectives inside them are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsprune.engine.learning.batches import Batches, MicroBatch
from dsprune.engine.learning.student import TeacherSignal
from dsprune.engine.zero.torch_autocast import autocasting

__all__ = ["Seen", "Witness", "first_trial", "named"]

TRIALS = "loss"
"""Name of the losses of the sets of gates that were tried."""


@dataclass
class Seen:
    """What one rank saw in one micro-batch.

    Attributes:
        sums: by what `Evidence` calls it, to be added up over micro-batches.
        parts: losses of a pass that was there anyway, as `Student.forward` returns them; None where none was.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    parts: Tensor | None = None


class Witness:
    """Takes the passes that evidence needs, of one stage.

    Args:
        engine: the student's.
        batches: of this rank.
    """

    def __init__(self, engine: Any, batches: Batches) -> None:
        self.engine = engine
        self.batches = batches

    def probe(
        self, batch: MicroBatch, signal: TeacherSignal | None, gates: Mapping[str, Tensor], *, scale: float
    ) -> Seen:
        """The gradient of the loss without its layerwise part, added to the gates' own and to nothing else.

        Args:
            batch: on the device.
            signal: of the teacher; None where nobody teaches.
            gates: leaves that ask for gradients.
            scale: that the gradients have, as those of the training pass do.
        """
        arguments = (batch.inputs, batch.labels, batch.num_targets, dict(gates), signal)
        with autocasting(self.engine):
            loss, parts, _ = self.engine.module(*arguments, probe=True)
        share = scale / self.batches.plan.accumulation
        gradients = torch.autograd.grad(loss * share, list(gates.values()), allow_unused=True)
        for gate, gradient in zip(gates.values(), gradients, strict=True):
            if gradient is not None:
                gate.grad = gradient if gate.grad is None else gate.grad + gradient
        return Seen(parts=parts)

    def squares(self, step: int, micro_step: int, gates: Mapping[str, Tensor], *, scale: float) -> Seen:
        """Squares of the gradient of each example's own loss on its labels, summed over examples, float64.

        Every example is passed by itself, as long as it is: the same numbers however a batch is cut.

        Args:
            step: optimizer step.
            micro_step: of the step.
            gates: leaves that ask for gradients.
            scale: that losses have while they are differentiated; gradients are unscaled before they are squared.
        """
        sums = {kind: torch.zeros_like(gate, dtype=torch.float64) for kind, gate in gates.items()}
        parts = []
        with self._without_dropout():
            for example in self.batches.singles(step, micro_step):
                with autocasting(self.engine):
                    arguments = (example.inputs, example.labels, example.num_targets, dict(gates), None)
                    loss, losses, _ = self.engine.module(*arguments, probe=True)
                gradients = torch.autograd.grad(loss * scale, list(gates.values()), allow_unused=True)
                for kind, gradient in zip(gates, gradients, strict=True):
                    if gradient is not None:
                        sums[kind] += (gradient.double() / scale).square()
                parts.append(losses)
        return Seen(sums, torch.stack(parts).sum(0) / self.batches.mean_targets(step))

    @torch.no_grad()
    def trials(self, batch: MicroBatch, gates: Mapping[str, Tensor]) -> Seen:
        """Losses on the labels under each set of gates: [trials].

        Args:
            batch: on the device.
            gates: by kind, [trials, ...].
        """
        with self._without_dropout(), autocasting(self.engine):
            found = [
                self.engine.module(batch.inputs, batch.labels, batch.num_targets, trial, None, probe=True)[1]
                for trial in _each(gates)
            ]
        losses = torch.stack(found) / self.batches.plan.accumulation
        return Seen({TRIALS: losses[:, 0]}, found[0])

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Modules as they evaluate, and afterwards as they were."""
        module = self.engine.module
        training = module.training
        module.eval()
        try:
            yield
        finally:
            module.train(training)


def _each(gates: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Sets of gates, from those that one more axis counts."""
    count = len(next(iter(gates.values())))
    yield from ({kind: gate[i] for kind, gate in gates.items()} for i in range(count))


def first_trial(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The set of gates that the training pass has where several are tried."""
    return next(_each(gates))


def named(evidence: str, reduced: Mapping[str, Tensor], world_size: int) -> dict[str, Tensor]:
    """What `Method.learn` is given, from means over ranks: squares are sums over all examples."""
    factor = world_size if evidence == "squares" else 1
    return {name: value * factor for name, value in reduced.items()}
