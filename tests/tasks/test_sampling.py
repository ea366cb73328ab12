from __future__ import annotations

import itertools

import pytest
import torch

from dsprune.errors import ConfigError
from dsprune.tasks.sampling import epoch_order, eval_shard, micro_batch, steps_per_epoch


@pytest.fixture(scope="module")
def lengths() -> torch.Tensor:
    return torch.randint(4, 60, (4003,), generator=torch.Generator().manual_seed(0))


def test_incomplete_batch_is_dropped() -> None:
    assert steps_per_epoch(100, 32) == 3
    assert steps_per_epoch(32, 32) == 1


def test_training_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch\.size = 32, but there are only 31"):
        steps_per_epoch(31, 32)


def test_epoch_holds_every_example_at_most_once(lengths: torch.Tensor) -> None:
    order = epoch_order(lengths, batch_size=32, seed=1, epoch=0)
    assert order.shape == (125, 32)
    assert order.dtype == torch.int64
    assert order.unique().numel() == 4000
    assert 0 <= order.min() <= order.max() < 4003


def test_order_depends_on_its_arguments_alone(lengths: torch.Tensor) -> None:
    def order(seed: int = 1, epoch: int = 0) -> torch.Tensor:
        return epoch_order(lengths, batch_size=32, seed=seed, epoch=epoch)

    first = order()
    torch.manual_seed(99)
    assert torch.equal(order(), first)
    assert not torch.equal(order(epoch=1), first)
    assert not torch.equal(order(seed=2), first)
    # Epochs of one seed are not those of the next.
    assert not torch.equal(order(seed=1, epoch=1), order(seed=2, epoch=0))


def test_batches_are_grouped_by_length_and_not_sorted(lengths: torch.Tensor) -> None:
    order = epoch_order(lengths, batch_size=32, seed=1, epoch=0)
    widths = lengths[order].max(dim=1).values
    waste = 1 - lengths[order].sum() / (widths * 32).sum()
    shuffled = torch.randperm(4000, generator=torch.Generator().manual_seed(1)).view(125, 32)
    waste_shuffled = 1 - lengths[shuffled].sum() / (lengths[shuffled].max(dim=1).values * 32).sum()
    assert waste < 0.05 < 0.4 < waste_shuffled
    rising = (widths[1:] >= widths[:-1]).float().mean()
    assert 0.3 < rising < 0.7


def test_the_dropped_examples_are_not_the_longest(lengths: torch.Tensor) -> None:
    dropped = [
        set(range(4003)) - set(epoch_order(lengths, batch_size=32, seed=1, epoch=epoch).flatten().tolist())
        for epoch in range(5)
    ]
    assert all(len(examples) == 3 for examples in dropped)
    assert len(set.union(*dropped)) > 10


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2), (3, 4)])
def test_micro_batches_partition_a_step(world_size: int, accumulation: int) -> None:
    step = torch.arange(100, 124)
    micro_batch_size = 24 // (world_size * accumulation)
    shares = [
        micro_batch(step, micro_step=micro_step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank, micro_step in itertools.product(range(world_size), range(accumulation))
    ]
    assert all(len(share) == micro_batch_size for share in shares)
    assert sorted(torch.cat(shares).tolist()) == step.tolist()


def test_ranks_get_similar_lengths_in_one_micro_step() -> None:
    lengths_of_a_step = torch.arange(32)
    for micro_step in range(4):
        widest = [
            int(micro_batch(lengths_of_a_step, micro_step=micro_step, rank=r, world_size=2, micro_batch_size=4).max())
            for r in range(2)
        ]
        assert abs(widest[0] - widest[1]) == 1


@pytest.mark.parametrize("num_examples", [1, 7, 8, 9, 16, 65, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_counts_every_example_once_with_ranks_in_step(num_examples: int, world_size: int) -> None:
    shards = [eval_shard(num_examples, rank=r, world_size=world_size, batch_size=8) for r in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    batches = [batch for shard in shards for batch in shard]
    assert all(batch.indices and len(batch.indices) <= 8 for batch in batches)
    counted = [index for indices, num_real in batches for index in indices[:num_real]]
    assert sorted(counted) == list(range(num_examples))


def test_evaluation_batches_by_length_waste_less() -> None:
    lengths = torch.tensor([5, 50] * 40)
    batches = eval_shard(80, rank=0, world_size=1, batch_size=8, lengths=lengths)
    assert all(lengths[batch.indices].unique().numel() == 1 for batch in batches)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(80))
