"""What is about to be saved is looked at first: what is not finite, out of its range, or unequal is never saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsprune.engine.learning.guard import check_gates
from dsprune.engine.learning.trainer import Trainer
from dsprune.errors import NumericsError

__all__ = ["check_before_commit"]


def check_before_commit(trainer: Trainer, step: int) -> None:
    """See that what is about to be saved is worth saving. Collective: all ranks must call.

    Raises:
        NumericsError: on all ranks: weights that are not finite, gates out of range, or replicas that differ.
    """
    where = f"{trainer.stage} step {step}"
    with trainer.world.together("checking what to save"):
        if not all(bool(part.isfinite().all()) for part in _local_weights(trainer.engine)):
            raise NumericsError(f"{where}: weights are not finite: lower the learning rate")
        if trainer.replica is not None:
            method = trainer.replica.method
            check_gates(where, method.evaluation_gates(step) or {}, method.parameters())
    if trainer.replica is not None:
        trainer.replica.check_equal(trainer.world, step)


def _local_weights(engine: Any) -> Iterator[Tensor]:
    """The master weights that this rank holds."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _shares(optimizer)
        return
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            yield from (part.detach() for part in getattr(optimizer, name))
            return
    yield from (param.detach() for param in engine.module.parameters())


def _shares(optimizer: Any) -> Iterator[Tensor]:
    """This rank's part of every parameter under ZeRO-3, without what makes parts equally long.

    DeepSpeed never writes that padding: it holds whatever was in memory before, infinities included.
    """
    rank = torch.distributed.get_rank()
    for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for param in params:
            numel = param.ds_tensor.ds_numel
            own = min(max(param.ds_numel - rank * numel, 0), numel)
            yield flat.detach()[offset : offset + own]
            offset += numel
