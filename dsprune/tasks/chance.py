"""Whether a model's answers are worse than those of somebody who knows nothing.

A teacher may be poor, and a student can still learn from it. But one that does worse than chance knows the task and
says it wrongly, under labels in another order or of another sign, and teaches exactly that. The rules:

- **Labels.** Its answers are compared with the best that exchanging its labels among one another could make of them
  (the assignment that maximises the trace of the confusion matrix; Kuhn 1955). What the two differ in is a sign test
  on the examples that only one of them gets right (McNemar 1947): by chance alone neither is favoured. An exchange
  counts where it is `SIGMAS` standard deviations better and turns `GAP` of all answers from wrong to right. A model
  that guesses is caught by neither; one that gives the rarer of two labels to everything is, and should be.
- **Numbers.** Pearson's correlation with the labels is negative by as much, on Fisher's scale, where its standard
  deviation is 1 / sqrt(n - 3).
- **Text.** A model that takes all V tokens for equally likely has perplexity V. One that is e times as perplexed has
  learnt another text, or other numbers for its tokens.
- **Spans** have no wrong order, and no chance to be below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dsprune.tasks.base import Task
from dsprune.tasks.batching import Encoded
from dsprune.tasks.losses import IGNORED

__all__ = ["below_chance", "only_guesses"]

SIGMAS = 4.0
GAP = 0.1


def _answers(task: Task, outputs: Tensor, data: Encoded) -> tuple[Tensor, Tensor]:
    """Class that is given and class that is right, for every example or labelled token: [answers] int64 each."""
    if task.problem == "tokens":
        real = torch.arange(outputs.shape[1]) < data.lengths[:, None]
        labelled = data.labels != IGNORED
        return outputs[real].argmax(-1)[labelled], data.labels[labelled].long()
    return outputs.argmax(-1), data.labels.long()


def _confusion(given: Tensor, right: Tensor, classes: int) -> np.ndarray:
    """Answers by the class that is right and the class that is given: [classes, classes]."""
    return torch.bincount(right * classes + given, minlength=classes**2).view(classes, classes).numpy()


def below_chance(
    task: Task, outputs: Tensor, data: Encoded, scores: Mapping[str, float], *, vocab_size: int
) -> str | None:
    """Why a model does worse than chance on a split, as the module tells; None where it does not.

    Args:
        task: that the outputs are of.
        outputs: [features, ...] of the whole split, as `Task.score` takes them.
        data: the split.
        scores: the task's metrics of these outputs.
        vocab_size: of the model.
    """
    if task.problem in ("classification", "tokens"):
        return _exchanged(*_answers(task, outputs, data), task.labels)
    if task.problem == "regression":
        return _reversed(outputs.squeeze(-1), data.labels)
    perplexity = scores.get("perplexity", 0.0)
    if task.problem == "text" and perplexity > math.e * vocab_size:
        return (
            f"its perplexity is {perplexity:.4g}, and {vocab_size} for one who takes all tokens for equally likely: it "
            "was trained with other tokens, or for another task"
        )
    return None


def _exchanged(given: Tensor, right: Tensor, labels: tuple[str, ...]) -> str | None:
    confusion = _confusion(given, right, len(labels))
    meant, named = linear_sum_assignment(confusion, maximize=True)
    moved = [(int(i), int(j)) for i, j in zip(meant, named, strict=True) if i != j]
    gained, lost = sum(confusion[i, j] for i, j in moved), sum(confusion[j, j] for _, j in moved)
    differing, count = gained + lost, len(right)
    if gained - lost <= GAP * count or gained - lost <= SIGMAS * math.sqrt(differing):
        return None
    before, after = np.trace(confusion) / count, (np.trace(confusion) + gained - lost) / count
    exchange = ", ".join(f"{labels[j]} -> {labels[i]}" for i, j in moved)
    return (
        f"{before:.1%} of its answers are right, and {after:.1%} with its labels exchanged ({exchange}): its head is "
        "in another order than its config.json says, or it was not trained for this task; mend id2label there"
    )


def _reversed(given: Tensor, right: Tensor) -> str | None:
    if len(right) <= 3 or given.std() == 0 or right.std() == 0:
        return None
    correlation = float(torch.corrcoef(torch.stack([given.double(), right.double()]))[0, 1])
    # A correlation of exactly 1 or -1 is infinitely far from chance.
    fisher = math.atanh(min(max(correlation, -1 + 1e-12), 1 - 1e-12))
    if correlation > -GAP or fisher * math.sqrt(len(right) - 3) > -SIGMAS:
        return None
    return f"what it gives falls where the labels rise (correlation {correlation:.2f}): it has another sign, or task"


def only_guesses(task: Task, outputs: Tensor, data: Encoded) -> str | None:
    """That a model is no better than one answer for everything, in words; None where it is, or no such thing exists."""
    if task.problem not in ("classification", "tokens"):
        return None
    given, right = _answers(task, outputs, data)
    counts = torch.bincount(right, minlength=len(task.labels))
    best, hits = int(counts.argmax()), int((given == right).sum())
    if hits > int(counts[best]):
        return None
    alike = int(counts[best]) / len(right)
    return f"{hits / len(right):.1%} of its answers are right, and {alike:.1%} if all were '{task.labels[best]}'"
