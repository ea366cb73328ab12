"""Evaluation over all ranks: every example counted once, every rank in step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsprune.engine.learning.batches import to_device
from dsprune.engine.ranks.alone import Ranks
from dsprune.engine.ranks.pulse import pulse
from dsprune.tasks import Encoded, Task
from dsprune.tasks.sampling import eval_shard

__all__ = ["BeforeBatch", "Forward", "evaluate", "evaluate_all", "join_splits", "predict"]

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""Inputs and labels on the device to what metrics are made of: [batch, n], or [batch, length, classes]."""
BeforeBatch = Callable[[], None]
"""Called on all ranks before every batch; may raise to give up."""


@torch.no_grad()
def predict(forward: Forward, data: Encoded, world: Ranks, *, batch_size: int, before_batch: BeforeBatch) -> Tensor:
    """What metrics of one split are made of, on every rank: [examples, ...] in the order of the split, fp32.

    Collective: all ranks must call, and under ZeRO-3 forward in step.
    """
    found: list[Tensor] = []
    kept: list[Tensor] = []
    width = int(data.lengths.max())
    shard = eval_shard(len(data), rank=world.rank, world_size=world.size, batch_size=batch_size, lengths=data.lengths)
    for indices, num_real in shard:
        before_batch()
        pulse.at(phase=f"evaluating {data.name}")
        inputs, labels, _ = to_device(data.collate(indices), world)
        out = forward(inputs, labels)[:num_real].float().cpu()
        found.append(out if out.dim() == 2 else F.pad(out, (0, 0, 0, width - out.shape[1])))
        kept.append(torch.as_tensor(indices[:num_real], dtype=torch.int64))
    shards = world.gather((torch.cat(kept).numpy(), torch.cat(found).numpy()), "collecting predictions")
    order = torch.cat([torch.from_numpy(indices) for indices, _ in shards])
    predictions = torch.cat([torch.from_numpy(values) for _, values in shards])
    return predictions[order.argsort()]


def evaluate(
    forward: Forward, task: Task, data: Encoded, world: Ranks, *, batch_size: int, before_batch: BeforeBatch
) -> dict[str, float]:
    """The task's metrics on one split. Collective, as `predict` is."""
    return task.score(predict(forward, data, world, batch_size=batch_size, before_batch=before_batch), data)


def evaluate_all(
    forward: Forward,
    task: Task,
    evals: Mapping[str, Encoded],
    world: Ranks,
    *,
    batch_size: int,
    before_batch: BeforeBatch,
) -> dict[str, float]:
    """Metrics of all evaluation splits, named as `join_splits` has it. Collective: all ranks must call."""
    settings: dict[str, Any] = {"batch_size": batch_size, "before_batch": before_batch}
    return join_splits({split: evaluate(forward, task, data, world, **settings) for split, data in evals.items()})


def join_splits(scores: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """Metrics of several splits: named `metric`, or `split/metric` unless the split is the only official one."""
    if list(scores) == ["validation"]:
        return scores["validation"]
    return {f"{split}/{name}": value for split, values in scores.items() for name, value in values.items()}
