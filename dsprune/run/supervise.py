"""Running a launcher that neither passes signals on nor tells the truth about how its ranks ended.

DeepSpeed's launcher dies of a signal and leaves its ranks behind, and returns 0 when its own child is
killed. So a signal becomes a STOP file, which the ranks watch; what is left of the process group is ended;
and success is what training wrote to status.json, nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from dsprune.engine.ranks.stop import SIGNALS
from dsprune.errors import DspruneError, OutputError, PeerLostError, Preempted
from dsprune.run.status import read_status
from dsprune.run_folder import RunFolder

__all__ = ["supervise", "verdict"]

GRACE_SECONDS = 5.0
"""Between asking what is left of a launch to end, and ending it."""


def supervise(command: Sequence[str], environment: Mapping[str, str], folder: RunFolder) -> int:
    """Run a launcher to its end.

    Args:
        command: of the launcher.
        environment: of it.
        folder: run folder of its ranks.

    Returns:
        The exit code of the run, by `dsprune.errors`.

    Raises:
        OutputError: the run folder cannot be made.
    """
    began = time.time()
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.stop.unlink(missing_ok=True)  # asked of an earlier launch that did not live to see it
    except OSError as error:
        raise OutputError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    process = subprocess.Popen(list(command), env=dict(environment), start_new_session=True)
    asked = 0

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        folder.stop.touch()
        if number == signal.SIGINT and asked > 1:
            os.killpg(process.pid, signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        code = process.wait()
    finally:
        _end_group(process.pid)
        for number, handler in before.items():
            signal.signal(number, handler)
    return verdict(read_status(folder), code, began)


def _end_group(group: int) -> None:
    """End what the launcher left behind."""
    deadline = time.monotonic() + GRACE_SECONDS
    number = signal.SIGTERM
    while True:
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        if number == signal.SIGKILL:
            return
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        time.sleep(0.1)


def verdict(status: Mapping[str, Any], code: int, began: float) -> int:
    """Exit code of a run.

    Args:
        status: as `read_status` gives it.
        code: the launcher's, for a run that never came to write a status.
        began: when it was launched, in seconds since 1970; an older status says nothing.
    """
    if status.get("written", 0.0) < began:
        return code if code > 0 else DspruneError.exit_code
    if status["state"] == "done":
        return 0
    if status["state"] == "preempted":
        return Preempted.exit_code
    if status["state"] == "failed":
        return int(status["exit_code"])
    return PeerLostError.exit_code  # still "running": rank 0 was killed
