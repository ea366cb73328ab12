"""Real ranks for tests: forked from a parent that has everything imported, meeting through a file.

A launch through the real launcher costs half a minute, mostly imports; a forked world costs two seconds.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

COLLECTIVE_TIMEOUT = 60.0
HUNG_SECONDS = 100.0
"""After which a rank says where it is: no test lets one run for longer than two minutes."""


def preload() -> None:
    """Import, once and before any fork, what every rank would import for itself."""
    from dsprune.engine.zero.operators import skip_shared_memory

    skip_shared_memory()
    import torch
    import torch._dynamo
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401 (imported lazily at engine start)

    import dsprune.run.session  # noqa: F401

    torch.set_num_threads(1)


def _be_rank(fn: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    """Run `fn` as one rank, in a forked child; never returns."""
    code = 1
    try:
        log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        faulthandler.dump_traceback_later(HUNG_SECONDS, file=2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
        # Only read by libraries that insist on them; ranks meet through the file.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
        # tqdm's lock is shared by all processes forked from here: a rank that is killed while it holds it would take
        # every later world with it.
        tqdm.set_lock(threading.RLock())
        _join(rank, world_size, folder)
        result = fn(*args)
        (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # No destructors: a process group must not wait for a rank that failed.
        os._exit(code)


def _join(rank: int, world_size: int, folder: Path) -> None:
    import datetime

    import deepspeed
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed("gloo", verbose=False)


def run_world(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Run `fn(*args)` on every rank of a new gloo world.

    Returns:
        What each rank returned (picklable), by rank.

    Raises:
        AssertionError: a rank failed or hung; the message holds its output.
    """
    folder, children = _start(fn, world_size, args)
    failed = _wait(children, time.monotonic() + timeout)
    if failed is not None:
        logs = "\n".join(f"--- {p.name}\n{p.read_text()[-6000:]}" for p in sorted(folder.glob("rank*.log")))
        raise AssertionError(f"{failed}\n{logs}")
    results = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world_size)]
    shutil.rmtree(folder)
    return results


def _start(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> tuple[Path, dict[int, int]]:
    """Fork the ranks; returns where they write, and each one's rank by process id."""
    preload()
    folder = Path(tempfile.mkdtemp(prefix="world-"))
    children: dict[int, int] = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _be_rank(fn, rank, world_size, folder, args)
        children[pid] = rank
    return folder, children


@dataclass(frozen=True)
class Ending:
    """How the ranks of a world ended.

    Attributes:
        codes: by rank, what it returned, or minus the signal that killed it.
        log: what all of them printed.
        seconds: from the first end of a rank to the last.
    """

    codes: list[int]
    log: str
    seconds: float


def run_to_the_end(
    fn: Callable[..., int],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    meddle: Callable[[dict[int, int]], None] = lambda pids: None,
) -> Ending:
    """Run `fn(*args)` on every rank of a new gloo world, and let each rank end as it will.

    Args:
        fn: returns an exit code.
        world_size: number of ranks.
        args: of `fn`.
        timeout: seconds after which those that still run are killed and the test fails.
        meddle: called in the parent with the process ids by rank, while they run.

    Raises:
        AssertionError: some rank did not end in time.
    """
    folder, children = _start(fn, world_size, args)
    deadline, ends = time.monotonic() + timeout, dict[int, tuple[float, int]]()
    meddler = threading.Thread(target=meddle, args=({rank: pid for pid, rank in children.items()},))
    meddler.start()
    alive = dict(children)
    while alive and time.monotonic() < deadline:
        pid, status = _poll(alive)
        if pid:
            ends[alive.pop(pid)] = (time.monotonic(), os.waitstatus_to_exitcode(status))
        else:
            time.sleep(0.01)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    meddler.join()
    log = "\n".join(f"--- {p.name}\n{p.read_text()[-6000:]}" for p in sorted(folder.glob("rank*.log")))
    assert not alive, f"ranks {sorted(alive.values())} did not end in time\n{log}"
    codes = [_returned(folder, rank, ends[rank][1]) for rank in range(world_size)]
    shutil.rmtree(folder)
    times = [moment for moment, _ in ends.values()]
    return Ending(codes, log, max(times) - min(times))


def _returned(folder: Path, rank: int, code: int) -> int:
    path = folder / f"rank{rank}.pickle"
    return int(pickle.loads(path.read_bytes())) if code == 0 and path.exists() else code


def _wait(children: dict[int, int], deadline: float) -> str | None:
    """Wait for all children; on the first failure or at the deadline kill the rest. Returns what went wrong."""
    alive, failed = dict(children), None
    while alive and failed is None:
        pid, status = _poll(alive)
        if pid:
            rank = alive.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            failed = f"rank {rank} ended with {code}" if code else None
        elif time.monotonic() > deadline:
            failed = f"ranks {sorted(alive.values())} did not end in time"
        else:
            time.sleep(0.02)
    if failed is not None:
        # The others may be about to say why; give them a moment.
        time.sleep(0.5)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return failed


def _poll(alive: dict[int, int]) -> tuple[int, int]:
    for pid in alive:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return pid, status
    return 0, 0
