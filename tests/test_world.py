"""The forked worlds themselves: results by rank, failures by name, and nothing left running."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


def _sum(value):
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def test_ranks_meet_and_return():
    assert run_world(_sum, 2, 10) == [(0, 30), (1, 30)]


def _fail_on_one(path):
    path.joinpath(str(os.getpid())).touch()
    if dist.get_rank() == 1:
        raise ValueError("a reason of its own")
    dist.barrier()


def test_a_failing_rank_is_named_with_its_reason(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)rank [01] ended with.*ValueError: a reason of its own"):
        run_world(_fail_on_one, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_a_hanging_rank_is_ended():
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0\] did not end in time"):
        run_world(time.sleep, 1, 600, timeout=4)
    assert time.monotonic() - began < 60
