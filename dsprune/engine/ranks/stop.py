"""Stopping when asked: by a signal, by a file, by the clock.

A handler sets a flag and does nothing else. The flag is looked at where work can be cut (after a step,
between evaluation batches, before a stage, after a save), always together with all other ranks, so that
all of them stop at the same place.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from dsprune.engine.ranks.world import World
from dsprune.errors import OutputError, Preempted

__all__ = ["REASONS", "Stop", "describe", "seconds_left", "unheard"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
REASONS = (*(number.name for number in SIGNALS), "STOP file", "time limit")
"""Why a run is asked to stop; ranks exchange flags in this order."""


def seconds_left(time_limit_minutes: float | None, margin_minutes: float) -> float | None:
    """Seconds until a run should stop by itself; None where nobody set a limit.

    SLURM tells the end of a job in `SLURM_JOB_END_TIME`, in seconds since 1970.
    """
    limits = [] if time_limit_minutes is None else [60 * time_limit_minutes]
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        limits.append(int(end) - time.time() - 60 * margin_minutes)
    return min(limits, default=None)


def describe(flags: Sequence[float]) -> str | None:
    """The reasons that flags (summed over ranks, or averaged) stand for; None where there is none."""
    return " and ".join(reason for reason, flag in zip(REASONS, flags, strict=True) if flag > 0) or None


@contextmanager
def unheard() -> Iterator[None]:
    """Processes started inside never hear the signals; this one hears them when it leaves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stop:
    """Whether this rank was asked to stop."""

    def __init__(self) -> None:
        self._signals: set[int] = set()
        self._file: Path | None = None
        self._deadline: float | None = None

    def listen(self) -> Stop:
        """Take the signals from now on; a second SIGINT ends the process as usual."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.add(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def watch(self, file: Path | None, *, seconds: float | None) -> None:
        """Watch a file that asks the run to stop, and the clock.

        Args:
            file: to look for; None on ranks that leave it to another.
            seconds: from now until the run should stop by itself; None for no limit.
        """
        self._file = file
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def flags(self) -> list[float]:
        """One 0 or 1 for each of `REASONS`, as this rank sees them."""
        asked = [number in self._signals for number in SIGNALS]
        asked.append(self._file is not None and self._file.exists())
        asked.append(self._deadline is not None and time.monotonic() >= self._deadline)
        return [float(flag) for flag in asked]

    def agreed(self, world: World) -> str | None:
        """Why to stop, the same on all ranks; None to go on. Collective: all ranks must call."""
        flags = world.sum_(torch.tensor(self.flags(), device=world.device), "agreeing whether to stop")
        return describe(flags.tolist())

    def check(self, world: World, doing: str) -> None:
        """Stop here if any rank was asked to. Collective: all ranks must call.

        Raises:
            Preempted: on all ranks, or on none.
        """
        reason = self.agreed(world)
        if reason is not None:
            raise Preempted(f"{doing}: stopped by {reason}; start the same command again to go on")

    def consume(self) -> None:
        """Remove the STOP file once it was followed, or the next launch would stop as well.

        Raises:
            OutputError: it cannot be removed.
        """
        if self._file is None:
            return
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot remove {self._file}: {error.strerror}; the next launch would stop") from error
