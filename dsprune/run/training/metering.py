"""Means of losses and throughput between two lines of the journal, and how such a line is made."""

from __future__ import annotations

import time
from typing import Any

from dsprune.engine.learning.trainer import StepResult, Trainer
from dsprune.methods.parts import optimizers_of
from dsprune.run.journal import Journal

__all__ = ["Meter", "log_step"]


class Meter:
    """Means of losses and throughput between two lines of the journal."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._reset()

    def state(self) -> dict[str, Any]:
        """What has been added since the last line, as JSON values."""
        return {"sums": self._sums, "steps": self._steps, "tokens": self._tokens}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; the clock starts anew, and counts no tokens from before."""
        self._sums, self._steps = dict(state["sums"]), int(state["steps"])

    def _reset(self) -> None:
        self._sums = {}
        self._steps = self._tokens = 0
        self._began = time.perf_counter()

    def add(self, result: StepResult, tokens: int) -> None:
        for name, value in result.losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._tokens += tokens

    def take(self) -> dict[str, float]:
        """Means since the last call, and tokens per second over all ranks."""
        seconds = time.perf_counter() - self._began
        means = {f"loss/{name}": value / self._steps for name, value in self._sums.items()}
        means["tokens_per_second"] = self._tokens / seconds
        self._reset()
        return means


def log_step(journal: Journal, trainer: Trainer, meter: Meter, step: int) -> dict[str, str]:
    """Write one line of metrics; returns what the progress bar shows. `step` counts steps done."""
    metrics = meter.take() | ({"lr/weights": trainer.lr(step - 1)} if trainer.trains_weights else {})
    if trainer.replica is not None:
        metrics |= trainer.replica.method.metrics(step)
        for i, optimizer in enumerate(optimizers_of(trainer.replica.method)):
            metrics[f"lr/{('gates', 'multipliers')[i] if i < 2 else i}"] = optimizer.param_groups[0]["lr"]
    journal.log(trainer.stage, step, metrics)
    note = {"loss": f"{metrics['loss/total']:.4f}"}
    if trainer.replica is not None and "sparsity/hard" in metrics:
        note["sparsity"] = f"{metrics['sparsity/hard']:.1%}"
    return note
