"""What stands in a run folder beside its results: its status, its lock, and what each failed rank had to say.

An exit code passes through launchers that may lose it (DeepSpeed's returns 0 when its own child is
killed). The status is a file that only training writes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsprune import errors
from dsprune.engine.ranks.pulse import describe_ranks, read_beats
from dsprune.errors import DspruneError, OutputError, PeerLostError
from dsprune.files import first_line, write_json
from dsprune.run_folder import RunFolder

__all__ = ["Failures", "RunLock", "Status", "read_status"]

PATIENCE_SECONDS = 5.0
"""How long a rank that lost another waits for its last words."""


def _identity() -> dict[str, Any]:
    """This process, so that another can tell whether it still lives."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
    }


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks; None where there is none, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return None


def read_status(folder: RunFolder) -> dict[str, Any]:
    """status.json of a run; empty where there is none that can be read."""
    try:
        status: dict[str, Any] = json.loads(folder.status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status


class Status:
    """Writes status.json: `state` is running, preempted, failed or done. On ranks other than the first it does nothing.

    Attributes:
        stage: under way.
        step: optimizer steps of it that are done.
    """

    def __init__(self, folder: RunFolder, *, active: bool) -> None:
        self.folder = folder
        self.active = active
        self.stage: str | None = None
        self.step = 0
        self._state: str | None = None
        self._writing = threading.Lock()

    def write(self, state: str, **facts: Any) -> None:
        """Write how the run stands, and on the disk before this returns."""
        if not self.active:
            return
        with self._writing:
            self._state = state
            self._write(state, facts)

    def refresh(self) -> None:
        """Bring the step of a run that goes on up to date; from the thread that beats."""
        with self._writing:
            if self._state == "running":
                self._write("running", {}, sync=False)

    def _write(self, state: str, facts: Mapping[str, Any], *, sync: bool = True) -> None:
        place = {"stage": self.stage, "step": self.step}
        entry = {"state": state, **place, **facts, **_identity(), "written": time.time()}
        write_json(self.folder.status, entry, sync=sync)

    def ended(self, error: BaseException) -> None:
        """Record how the run ended. The error matters more than a status that cannot be written."""
        code = error.exit_code if isinstance(error, DspruneError) else DspruneError.exit_code
        try:
            self.write("preempted" if code == 75 else "failed", exit_code=code, reason=str(error) or repr(error))
        except OSError as reason:
            error.add_note(f"status.json could not be written either: {reason}")


class RunLock:
    """One launch at a time in a run folder: a file made with O_EXCL that names its holder. Held by rank 0."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.lock
        self._held = False

    def take(self) -> None:
        """Take the lock; one whose holder is gone is taken over.

        Raises:
            OutputError: another launch holds it, or the folder cannot be written.
        """
        for _ in range(2):
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._refuse_if_held()
                self.path.unlink(missing_ok=True)
                continue
            except OSError as error:
                raise OutputError(f"cannot write to the run folder {self.path.parent}: {error.strerror}") from error
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(_identity(), file)
            self._held = True
            return
        raise OutputError(f"{self.path} was taken by another launch just now")

    def _refuse_if_held(self) -> None:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            where = f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return  # its writer died between making and filling it
        ours = _identity()
        # A requeued job keeps its number, and SLURM starts it anew only when all of it has ended.
        requeued = holder.get("job") is not None and holder["job"] == ours["job"]
        requeued = requeued and holder.get("restart") != ours["restart"]
        here = holder["host"] == ours["host"]
        gone = here and _start_time(int(holder["pid"])) != holder.get("started")
        if gone or requeued:
            return
        raise OutputError(
            f"{self.path.parent} is in use by {where}: wait for it, choose another output=, or remove {self.path} if "
            "that process is gone"
        )

    def release(self) -> None:
        """Give the lock back; one that cannot be removed is taken over by the next launch, its holder being gone."""
        if self._held:
            self._held = False
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


class Failures:
    """Last words of failed ranks, for the others, who see no more than a closed connection."""

    def __init__(self, folder: RunFolder, rank: int) -> None:
        self.folder = folder
        self.rank = rank

    def clear(self) -> None:
        """Forget what earlier launches said. On one rank, before any can fail."""
        for path in self.folder.all_failures():
            path.unlink(missing_ok=True)

    def report(self, error: BaseException) -> None:
        """Say why this rank fails; what cannot be written is told on the screen anyway."""
        words = {"rank": self.rank, "kind": type(error).__name__, "message": str(error), **_identity()}
        try:
            self.folder.failures.mkdir(parents=True, exist_ok=True)
            write_json(self.folder.failure(self.rank), words)
        except OSError as reason:
            error.add_note(f"the other ranks could not be told: {reason}")

    def explain(self, error: Exception, doing: str) -> DspruneError:
        """Why a collective failed: another rank's last words, or that it left without any."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            for path in self.folder.all_failures():
                words = json.loads(path.read_text(encoding="utf-8"))
                kind = getattr(errors, words["kind"], None)
                if kind is not None:
                    return kind(f"{words['message']} (on rank {words['rank']})")  # type: ignore[no-any-return]
                return DspruneError(f"{doing}: rank {words['rank']} failed: {words['kind']}: {words['message']}")
            time.sleep(0.1)
        ranks = describe_ranks(read_beats(self.folder), time.time())
        return PeerLostError(
            f"{doing}: another rank is gone, killed or hung for longer than cluster.timeout_minutes"
            f"{f': {ranks}' if ranks else ''} ({first_line(error)}); start the same command again to go on from the "
            f"newest checkpoint; stacks of the ranks that still answered: {self.folder.stacks(0).parent}"
        )


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other end is gone."""
    text = str(error)
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
