"""Faults 4, 20, 22, 32: DeepSpeed's real launcher, killed and asked to stop; job scripts; a port that is taken.

Fault 22 and the rest of 20 need a SLURM: tests/slurm.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import assert_same, checkpoints, status, words

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.dist


def _start(*command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _of(run, what):
    """Processes of a run whose command line holds a word."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            command = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if path.name.isdigit() and f"output={run}" in command and any(word.endswith(what) for word in command):
            found.append(int(path.name))
    return sorted(found)


def _until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["deepspeed.launcher.runner", "deepspeed.launcher.launch"])
def test_f04_launcher_killed(place, undisturbed, tmp_path, victim):
    """Left to itself, DeepSpeed's returns 0 here and leaves its ranks behind."""
    run = tmp_path / "run"
    launch = (*words(place, run), "--ranks", "2")
    process = _start("-m", "dsprune", "train", *launch)
    # As early as there is something to lose: the run is over in seconds.
    _until(lambda: (run / "status.json").exists() and status(run)["stage"] == "prune", process)
    killed = _of(run, victim)
    assert len(killed) == 1
    os.kill(killed[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (69, 75), out
    assert status(run)["state"] != "done"
    assert _of(run, "train.py") == [], "orphans"
    process = _start("-m", "dsprune", "train", *launch)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert_same(run, undisturbed())


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_f20_signal_to_the_command(place, undisturbed, tmp_path, number):
    run = tmp_path / "run"
    launch = (*words(place, run), "--ranks", "2")
    process = _start("-m", "dsprune", "train", *launch)
    _until(lambda: bool(checkpoints(run)), process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert "stopped by STOP file" in out
    assert _of(run, "train.py") == [], "orphans"
    said = subprocess.run(
        [sys.executable, "-m", "dsprune", "status", run], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert said.returncode == 75
    assert "preempted, stage prune, step" in said.stdout
    process = _start("-m", "dsprune", "train", *launch)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert_same(run, undisturbed())


VERDICTS = [
    ({}, 64, 64),
    ({}, 0, 70),
    ({}, -9, 70),
    ({"state": "done", "written": 5.0}, 1, 1),
    ({"state": "done", "written": 20.0}, 1, 0),
    ({"state": "running", "written": 20.0}, 0, 69),
    ({"state": "preempted", "written": 20.0}, 0, 75),
    ({"state": "failed", "exit_code": 66, "written": 20.0}, 0, 66),
]


@pytest.mark.parametrize(("said", "code", "expected"), VERDICTS)
def test_f04_only_the_status_tells_success(said, code, expected):
    from dsprune.run.supervise import verdict

    assert verdict(said, code, 10.0) == expected


SCRIPT = """
export SLURM_JOB_ID=17 SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=2 SLURM_SUBMIT_DIR={root}
scontrol() {{ echo "scontrol $*" >> {calls}; }}
sleep() {{ :; }}
source {root}/slurm/lib.sh
start_ranks() {{ ( trap '' USR1 USR2; exec bash -c '{ranks}' ) & RANKS=$!; }}
dsprune() {{ return {code}; }}
train {run} recipe
exit $?
"""


def _script(tmp_path, *, code, ranks="command sleep 0.2", restarts=None, number=None, limit=50):
    """`train` of slurm/lib.sh with stand-ins for SLURM and the ranks; returns its exit code, output and calls."""
    calls, run = tmp_path / "calls", tmp_path / "run"
    calls.touch()
    text = SCRIPT.format(root=ROOT, calls=calls, run=run, ranks=ranks, code=code)
    environment = {**os.environ, "DSPRUNE_MAX_RESTARTS": str(limit)}
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    process = subprocess.Popen(
        ["bash", "-c", text], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if number is not None:
        _until(run.exists, process, 10)
        time.sleep(0.3)
        process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    return process.returncode, out, calls.read_text().splitlines(), run


@pytest.mark.parametrize(("code", "requeues"), [(0, 0), (75, 1), (69, 1), (66, 0), (74, 0), (70, 0)])
def test_f20_what_is_requeued(tmp_path, code, requeues):
    got, out, calls, _ = _script(tmp_path, code=code)
    assert got == code, out
    assert calls == ["scontrol requeue 17"] * requeues


def test_f20_a_signal_becomes_a_stop_file(tmp_path):
    ranks = f"while [ ! -f {tmp_path}/run/STOP ]; do command sleep 0.05; done"
    got, out, calls, run = _script(tmp_path, code=75, ranks=ranks, number=signal.SIGUSR2)
    assert got == 75, out
    assert (run / "STOP").exists()
    assert calls == ["scontrol requeue 17"]


def test_f20_who_is_cancelled_is_not_requeued(tmp_path):
    ranks = f"while [ ! -f {tmp_path}/run/STOP ]; do command sleep 0.05; done"
    got, out, calls, _ = _script(tmp_path, code=75, ranks=ranks, number=signal.SIGTERM)
    assert got == 75, out
    assert calls == []
    assert "asked to leave: not requeued" in out


def test_f22_requeue_storm(tmp_path):
    assert _script(tmp_path, code=69, limit=0)[2] == [], "a job that was never restarted has no count"
    for restarts, calls in ((49, ["scontrol requeue 17"]), (50, []), (51, [])):
        folder = tmp_path / str(restarts)
        folder.mkdir()
        got, out, made, _ = _script(folder, code=69, restarts=restarts)
        assert got == 69
        assert made == calls
        assert calls or f"restarted {restarts} times already (DSPRUNE_MAX_RESTARTS): not requeued" in out


MEET = """
import os, sys
from dsprune.cli import guarded
from dsprune.engine.ranks.world import start_world
sys.exit(guarded(lambda: start_world(0.1)))
"""


@pytest.mark.parametrize(("target", "key"), [("0.95", "prune.target=0.95"), ("10x", "prune.speedup=10")])
def test_job_scripts_take_sparsities_and_speedups(target, key):
    words = ["bash", "-c", f"source {ROOT}/slurm/lib.sh; aim {target}"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == f"{key}\n"


@pytest.mark.faults
def test_f32_port_taken():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", MEET],
            cwd=ROOT,
            env={**os.environ, **environment, "MASTER_PORT": port},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 64, done.stderr
    assert f"the ranks cannot meet at 127.0.0.1, port {port}" in done.stderr


def test_f32_every_launch_draws_a_free_port():
    from dsprune.run.launch import _free_port

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", _free_port()))
    assert len({_free_port() for _ in range(5)}) > 1
