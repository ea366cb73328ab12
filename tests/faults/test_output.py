"""Faults 10, 11: the disk is full, the folder cannot be written or vanishes, two launches share it."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys

import pytest

from dsprune.errors import OutputError
from dsprune.run.status import RunLock
from dsprune.run_folder import RunFolder
from tests.helpers.runs import assert_same, checkpoints, execute, status, words
from tests.helpers.world import run_to_the_end, run_world

pytestmark = pytest.mark.dist


def _full_from(step, how, rank, *words):
    """From the save of a step on, one rank cannot write: by a limit of the system, or by its answer."""
    from dsprune.engine.checkpoints import store as checkpoint

    saves = []

    def reached(point):
        if point == "begun":
            saves.append(point)
        if point != "cleared" or len(saves) != step // 2 or int(os.environ["RANK"]) != rank:
            return
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            return

        def refuse(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        checkpoint._fsync = refuse

    checkpoint.reached = reached
    return execute(*words)


@pytest.mark.parametrize(
    ("how", "student"),
    [
        ("limit", "zero3"),
        ("answer", "zero2"),
        pytest.param("limit", "zero1", marks=pytest.mark.faults),
        pytest.param("limit", "zero2", marks=pytest.mark.faults),
    ],
)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_f10_disk_full_while_writing(place, undisturbed, tmp_path, how, rank, student):
    run = tmp_path / "run"
    ending = run_to_the_end(_full_from, 2, 4, how, rank, *words(place, run, student=student))
    assert ending.codes == [73, 73], ending.log
    assert "cannot write a checkpoint to" in ending.log
    assert "free there" in ending.log
    assert "the checkpoints before it are intact" in ending.log
    assert [name for name in checkpoints(run) if not name.endswith(".tmp")] == ["step-00000002"]
    assert run_world(execute, 2, *words(place, run, student=student)) == [0, 0]
    assert_same(run, undisturbed(student=student))


def _little_room(*words):
    from dsprune.engine.checkpoints import store as checkpoint

    checkpoint.free_bytes = lambda folder: 1000
    return execute(*words)


def test_f10_too_little_room_before_a_byte_is_written(place, tmp_path):
    run = tmp_path / "run"
    ending = run_to_the_end(_little_room, 2, *words(place, run))
    assert ending.codes == [73, 73]
    assert "it needs" in ending.log
    assert "MiB are free" in ending.log
    assert checkpoints(run) == []


def _vanishes(run, *words):
    from dsprune.engine.learning.trainer import Trainer

    real = Trainer.step

    def step(self, number):
        if number == 2 and self.world.rank == 1:
            shutil.move(run, f"{run}-elsewhere")
            run.write_text("a file where the folder was")
        self.world.gather(None)
        return real(self, number)

    Trainer.step = step
    return execute(*words)


def test_f11_folder_vanishes(place, tmp_path):
    run = tmp_path / "run"
    ending = run_to_the_end(_vanishes, 2, run, *words(place, run))
    assert ending.codes == [73, 73], ending.log
    assert str(run) in ending.log


def test_f11_second_launch_in_the_same_folder(place, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started = open(f"/proc/{holder.pid}/stat").read().rpartition(")")[2].split()[19]
        lock = {"host": socket.gethostname(), "pid": holder.pid, "started": started, "job": None}
        (run / "LOCK").write_text(json.dumps(lock))
        ending = run_to_the_end(execute, 2, *words(place, run))
        assert ending.codes == [73, 73]
        assert f"in use by process {holder.pid}" in ending.log
        assert checkpoints(run) == []
    finally:
        holder.kill()
        holder.wait()
    assert run_world(execute, 2, *words(place, run)) == [0, 0], "who held it is gone"
    assert status(run)["state"] == "done"


LOCKS = {
    "its process is gone": ({"pid": 2**22 - 1, "started": "1"}, True),
    "its number was given to another process": ({"pid": os.getpid(), "started": "1"}, True),
    "half written": (None, True),
    "the same job, requeued": ({"host": "elsewhere", "job": "17", "restart": None}, True),
    "the same job, another step of it": ({"host": "elsewhere", "job": "17", "restart": "1"}, False),
    "another machine": ({"host": "elsewhere"}, False),
    "another job on another machine": ({"host": "elsewhere", "job": "18"}, False),
}


@pytest.mark.parametrize("case", LOCKS)
def test_f11_stale_locks(tmp_path, monkeypatch, case):
    holder, free = LOCKS[case]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    entry = {"host": socket.gethostname(), "pid": 1, "started": "1", "job": None}
    (tmp_path / "LOCK").write_text("{" if holder is None else json.dumps(entry | holder))
    lock = RunLock(RunFolder(tmp_path))
    if not free:
        with pytest.raises(OutputError, match="in use by process"):
            lock.take()
        return
    lock.take()
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    with pytest.raises(OutputError, match="in use by process"):
        RunLock(RunFolder(tmp_path)).take()
    lock.release()
    assert not (tmp_path / "LOCK").exists()
