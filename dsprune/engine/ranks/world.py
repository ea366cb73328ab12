"""The ranks of a run: how they start, agree, and fail together."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch._dynamo  # before any model is built under ZeRO-3, whose patched constructors break its lazy import
import torch.distributed as dist

from dsprune.engine.ranks.pulse import pulse
from dsprune.engine.zero.communication import join_ranks, pick_device
from dsprune.errors import ConfigError, DspruneError
from dsprune.files import first_line

__all__ = ["World", "start_world"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: T | None, doing: str = "broadcast") -> T:
        """Rank 0's value on every rank. Collective: all ranks must call.

        Args:
            value: of rank 0; those of the others do not matter.
            doing: name of the collective, for whoever waits in it.
        """
        box: list[Any] = [value]
        if self.size > 1:
            with pulse.waiting(doing):
                dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def gather(self, value: T, doing: str = "gather") -> list[T]:
        """Every rank's value on every rank. Collective: all ranks must call.

        Args:
            value: of this rank.
            doing: name of the collective.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with pulse.waiting(doing):
            dist.all_gather_object(values, value)
        return values

    def sum_(self, tensor: torch.Tensor, doing: str = "sum") -> torch.Tensor:
        """Sum over ranks, in place. Collective: all ranks must call.

        Args:
            tensor: of this rank.
            doing: name of the collective.
        """
        if self.size > 1:
            with pulse.waiting(doing):
                dist.all_reduce(tensor)
        return tensor

    def agree(self, doing: str, error: Exception | None) -> None:
        """Any rank's error becomes every rank's. Collective: all ranks must call.

        Raises:
            DspruneError: of the class of the first rank that failed, naming the ranks; a rank whose error
                is none of ours raises that itself, for its traceback.
        """
        told = self.gather(None if error is None else (type(error), str(error)), doing)
        failed = {rank: report for rank, report in enumerate(told) if report is not None}
        if not failed:
            return
        first, (kind, message) = next(iter(failed.items()))
        if not issubclass(kind, DspruneError):
            if error is not None:
                raise error
            raise DspruneError(f"{doing}: rank {first} failed: {kind.__name__}: {message}")
        where = "" if len(failed) == self.size else f" (on rank {', '.join(map(str, failed))})"
        raise kind(f"{message}{where}") from error

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """A step that all ranks take, or none: `agree` on how the block ended. Collective: all ranks must call."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(doing, error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_world(timeout_minutes: float = 30.0) -> World:
    """Join the process group that the launcher describes, or make one of a single process.

    Args:
        timeout_minutes: how long a rank waits for the others, here and in every collective.

    Raises:
        ConfigError: the ranks cannot meet: the port is taken, or some of them never came.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        join_ranks(datetime.timedelta(minutes=timeout_minutes))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"the ranks cannot meet at {where}: {first_line(error)}: the port is taken or not all ranks came; give "
            "another one (--master_port, MASTER_PORT)"
        ) from error
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
