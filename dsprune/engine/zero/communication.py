"""DeepSpeed's process group, and the device that it computes on."""

from __future__ import annotations

import datetime

import torch
from torch.distributed import distributed_c10d

from dsprune.engine.zero.operators import skip_shared_memory
from dsprune.engine.zero.requirements import quiet_import

deepspeed = quiet_import()

__all__ = ["join_ranks", "pick_device"]


def pick_device(local_rank: int) -> torch.device:
    """The device of a rank of this machine, made the current one."""
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(local_rank))


def join_ranks(timeout: datetime.timedelta) -> None:
    """Meet the other ranks that the environment describes.

    Args:
        timeout: how long to wait for them, here and in every collective, of process groups that DeepSpeed makes, too.

    Raises:
        torch.distributed.DistNetworkError, torch.distributed.DistStoreError: they cannot meet.
    """
    skip_shared_memory()
    # The engines make process groups of their own, and name no time-out for them.
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, default, timeout)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
