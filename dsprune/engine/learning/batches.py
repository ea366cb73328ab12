"""Micro-batches of one rank, a function of (seed, step) alone, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsprune.engine.ranks.alone import Ranks
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.config import BatchPlan
from dsprune.tasks import Encoded
from dsprune.tasks.losses import IGNORED
from dsprune.tasks.sampling import epoch_order, micro_batch, steps_per_epoch

__all__ = ["Batches", "MicroBatch", "to_device"]

NOTHING = torch.zeros(0, dtype=torch.int64)


@dataclass
class MicroBatch:
    """One micro-batch on the device.

    Attributes:
        inputs: the model's arguments, [batch, length] each.
        labels: [batch], or [batch, length] where tokens are labelled.
        token_index: [tokens] positions of real tokens in the flattened [batch * length].
        target_index: [targets] positions of what is predicted in the flattened labels; empty for labels of examples.
        num_tokens: [] real tokens of a mean micro-batch of this step, over all ranks and accumulation steps.
        num_targets: [] what is predicted (examples, or labelled tokens) in a mean micro-batch of this step.
        num_pairs: [] pairs of real tokens (squared lengths) in a mean micro-batch of this step.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    token_index: Tensor
    target_index: Tensor
    num_tokens: Tensor
    num_targets: Tensor
    num_pairs: Tensor


def to_device(batch: dict[str, Tensor], world: Ranks) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A collated batch as (inputs, labels, token_index) on the device."""
    token_index = batch["attention_mask"].flatten().nonzero().flatten()
    move = {name: tensor.to(world.device, non_blocking=True) for name, tensor in batch.items()}
    labels = move.pop("labels")
    return move, labels, token_index.to(world.device, non_blocking=True)


class Batches:
    """The training data of one stage, cut for one rank."""

    def __init__(self, data: Encoded, plan: BatchPlan, world: World, seed: int) -> None:
        self.data = data
        self.plan = plan
        self.world = world
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch(len(data), plan.size)
        self._epoch = -1
        self._order = torch.empty(0)

    def indices(self, step: int) -> Tensor:
        """Examples of one optimizer step, over all ranks: [batch.size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(self.data.lengths, batch_size=self.plan.size, seed=self.seed, epoch=epoch)
            self._epoch = epoch
        return self._order[position]

    def num_tokens(self, step: int) -> int:
        """Real tokens of one optimizer step, over all ranks."""
        return int(self.data.lengths[self.indices(step)].sum())

    def examples(self, step: int) -> list[int]:
        """This rank's examples of one optimizer step, by their place in the training split."""
        parts = [self._mine(step, micro_step) for micro_step in range(self.plan.accumulation)]
        return [int(index) for part in parts for index in part]

    def _mine(self, step: int, micro_step: int) -> Tensor:
        return micro_batch(
            self.indices(step),
            micro_step=micro_step,
            rank=self.world.rank,
            world_size=self.world.size,
            micro_batch_size=self.plan.micro,
        )

    def micro_batch(self, step: int, micro_step: int) -> MicroBatch:
        """This rank's micro-batch of a step."""
        data = self.data.in_epoch(step // self.steps_per_epoch)
        batch = data.collate(self._mine(step, micro_step))
        labels = batch["labels"]
        # Of an example with several labels these are no token ids.
        by_token = labels.dim() == 2 and not labels.is_floating_point()
        written = (labels != IGNORED).flatten().nonzero().flatten() if by_token else NOTHING
        inputs, labels, token_index = to_device(batch, self.world)
        shares = self.plan.world_size * self.plan.accumulation
        indices = self.indices(step)
        lengths = self.data.lengths[indices]
        totals = (int(lengths.sum()), int(self.data.targets[indices].sum()), int(lengths.square().sum()))
        means = torch.tensor([total / shares for total in totals], device=self.world.device)
        return MicroBatch(inputs, labels, token_index, written.to(self.world.device, non_blocking=True), *means)

    def mean_targets(self, step: int) -> float:
        """What is predicted in a mean micro-batch of a step, as `MicroBatch.num_targets`."""
        shares = self.plan.world_size * self.plan.accumulation
        return int(self.data.targets[self.indices(step)].sum()) / shares

    def singles(self, step: int, micro_step: int) -> Iterator[MicroBatch]:
        """The examples of a micro-batch, each by itself and as long as it is.

        Losses are divided by one: that of an example is the sum over what is predicted of it.
        """
        data = self.data.in_epoch(step // self.steps_per_epoch)
        one = torch.ones((), device=self.world.device)
        for index in self._mine(step, micro_step):
            inputs, labels, token_index = to_device(data.collate([int(index)]), self.world)
            yield MicroBatch(inputs, labels, token_index, NOTHING, one, one, one)
