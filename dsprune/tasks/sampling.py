"""Which examples a rank sees at which step: pure functions, so that a run can stop, resume and change its world size.

The global order depends on (seed, epoch) alone. Ranks and accumulation steps only cut it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsprune.errors import ConfigError

__all__ = ["EvalBatch", "epoch_order", "eval_shard", "micro_batch", "steps_per_epoch"]

MEGABATCH = 50
"""Batches among which examples are sorted by length: enough to save most padding, few enough to stay random."""


class EvalBatch(NamedTuple):
    """Examples of one evaluation forward pass; only the first `num_real` count, the rest keeps ranks in step."""

    indices: list[int]
    num_real: int


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the incomplete last one is dropped.

    Raises:
        ConfigError: not one whole batch.
    """
    if num_examples < batch_size:
        raise ConfigError(
            f"batch.size = {batch_size}, but there are only {num_examples} training examples: make the batch smaller"
        )
    return num_examples // batch_size


def epoch_order(lengths: Tensor, *, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Examples of every batch of one epoch, each example at most once: [steps, batch_size] int64.

    Batches hold examples of similar length: shuffle all, sort within groups of `MEGABATCH` batches,
    shuffle the batches. A function of its arguments alone.

    Args:
        lengths: [examples] tokens of each example.
        batch_size: examples in one optimizer step, over all ranks and accumulation steps.
        seed: seed of the run.
        epoch: counted from 0.
    """
    steps = steps_per_epoch(len(lengths), batch_size)
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(len(lengths))[: steps * batch_size]
    tokens = lengths.numpy()[shuffled]
    megabatch = np.arange(len(shuffled)) // (MEGABATCH * batch_size)
    grouped = shuffled[np.lexsort((tokens, megabatch))].reshape(steps, batch_size)
    return torch.from_numpy(grouped[rng.permutation(steps)])


def micro_batch(step_indices: Tensor, *, micro_step: int, rank: int, world_size: int, micro_batch_size: int) -> Tensor:
    """One rank's share of one accumulation step: [micro_batch_size].

    All shares of a step together are the step's examples, each once. Ranks take turns within an
    accumulation step, so that in batches sorted by length all wait for equally long examples.

    Args:
        step_indices: [batch] examples of one optimizer step.
        micro_step: accumulation step, counted from 0.
        rank: of this process.
        world_size: number of ranks.
        micro_batch_size: examples in one forward pass of one rank.
    """
    together = world_size * micro_batch_size
    assert len(step_indices) % together == 0
    return step_indices[micro_step * together : (micro_step + 1) * together][rank::world_size]


def eval_shard(
    num_examples: int, *, rank: int, world_size: int, batch_size: int, lengths: Tensor | None = None
) -> list[EvalBatch]:
    """One rank's evaluation batches: every example counts once over all ranks, every rank has as many batches.

    Under ZeRO-3 all ranks must run the same number of forward passes: a rank that runs short gets
    batches with one example that does not count (`num_real` 0).

    Args:
        num_examples: examples of the split.
        rank: of this process.
        world_size: number of ranks.
        batch_size: most examples in one forward pass of one rank.
        lengths: [num_examples] tokens of each example; given, batches hold examples of similar length.
    """
    order = torch.arange(num_examples) if lengths is None else lengths.argsort(descending=True, stable=True)
    chunks = [order[start : start + batch_size].tolist() for start in range(0, num_examples, batch_size)]
    batches = [EvalBatch(chunk, len(chunk)) for chunk in chunks]
    filler = EvalBatch([0], 0)
    batches += [filler] * (-len(batches) % world_size)
    return batches[rank::world_size]
