"""The job scripts on a real SLURM: two nodes on this machine, gloo, a tiny model (faults 1, 20, 22, and more).

Every chain is three jobs (train, consolidate on one CPU, recover), as users run it. Whatever happens to a chain, its
models must be those of the chain that nothing happened to, byte for byte.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.folders import tiny_recipe

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
STEPS = 40
ACTIVATE = f"export PATH={Path(sys.executable).parent}:$PATH OMP_NUM_THREADS=1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no SLURM here: {', '.join(missing)} not found (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([CLUSTER, "start", folder], capture_output=True, text=True, timeout=90, check=False)
    if started.returncode:
        subprocess.run([CLUSTER, "stop", folder], check=False)
        pytest.skip(f"SLURM did not come up: {started.stderr[-2000:]}")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    _command("scancel", "--user=root")
    deadline = time.monotonic() + 30
    while _command("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.5)
    subprocess.run([CLUSTER, "stop", folder], check=False)
    del os.environ["SLURM_CONF"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tiny_recipe(tmp_path_factory.mktemp("ground"))
    text = path.read_text().replace('duration = "6 steps"', f'duration = "{STEPS} steps"')
    path.write_text(text.replace('every = "4 steps"', 'every = "8 steps"').replace("true", "false"))
    return path


def _command(*words, **environment):
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def _submit(recipe, run, *options, script="glue.sh", settings=(), **environment):
    """sbatch on both nodes, one rank each; returns the job's number."""
    run.mkdir(parents=True)
    return _command(
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"),
        *(*options, ROOT / "slurm" / script, "order", "cofi", "0.5"),
        *("log.tensorboard=false", "cluster.timeout_minutes=2", *settings),
        RECIPE=str(recipe),
        RUN=str(run),
        DSPRUNE_ACTIVATE=ACTIVATE,
        SBATCH_OUTPUT=f"{run}/job-%j.log",
        DSPRUNE_HOME=str(ROOT),
        **environment,
    )


def _requeued(job, run, seconds):
    """Wait until SLURM has put a job back, and spare it the two minutes that it then has to wait."""
    _wait(
        lambda: (facts := _job(job))["Restarts"] == "1" and facts["JobState"] == "PENDING", run, seconds, "the requeue"
    )
    _command("scontrol", "update", f"jobid={job}", "starttime=now")


def _status(run):
    try:
        return json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def _logs(run):
    return "\n".join(
        f"--- {path.name}\n{path.read_text(errors='replace')[-5000:]}" for path in sorted(run.glob("job-*.log"))
    )


def _wait(condition, run, seconds, what):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s\n{_command('squeue')}\n{_logs(run)}")


def _finished(run):
    """The last phase has written its report, and no job is left."""
    return _status(run).get("state") == "done" and (run / "evaluate" / "done.json").exists()


def _job(number):
    return dict(word.split("=", 1) for word in _command("scontrol", "show", "job", number).split() if "=" in word)


def _pruning(run, step):
    status = _status(run)
    return status.get("stage") == "prune" and status.get("step", 0) >= step


def _processes(run, node, what="train.py"):
    """Numbers of the processes of a run on a node."""
    found = []
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            command = (path / "cmdline").read_bytes().decode().split("\0")
            environment = (path / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        if (
            any(word.endswith(what) for word in command)
            and f"output={run}" in command
            and f"SLURMD_NODENAME={node}" in environment
        ):
            found.append(int(path.name))
    return found


def _history(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def _assert_same(run, whole):
    assert _history(run) == _history(whole)
    for name in ("compact", "recovered"):
        assert (run / name / "model.safetensors").read_bytes() == (whole / name / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(cluster, recipe, tmp_path_factory):
    """The chain that nothing happens to."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    _submit(recipe, run)
    _wait(lambda: _finished(run), run, 400, "the undisturbed chain")
    return run


def test_a_chain_on_two_nodes(whole):
    logs = _logs(whole)
    assert logs.count("on one,two") == 2, "training and recovery used both nodes"
    assert "next: consolidate" in logs
    assert "next: recover" in logs
    assert (whole / "report.json").exists()


def test_f01_ranks_of_a_node_are_killed(cluster, recipe, whole, tmp_path):
    run = tmp_path / "run"
    job = _submit(recipe, run)
    _wait(lambda: _pruning(run, 8), run, 200, "the first checkpoint of the prune stage")
    victims = _processes(run, "two")
    assert victims, "no rank on node two"
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    killed_at = _status(run)
    _requeued(job, run, 90)
    _wait(lambda: _finished(run), run, 500, "the killed chain")
    assert _job(job)["Restarts"] == "1"
    logs = _logs(run)
    assert "going on from step" in logs
    resumed = next(line for line in logs.splitlines() if "prune: going on from step" in line)
    print(f"killed at {killed_at['stage']} step >= {killed_at['step']} on node two; {resumed}")
    _assert_same(run, whole)
    last = [line["loss/total"] for line in _history(run) if "loss/total" in line][-1]
    print(f"last loss {last!r}, undisturbed {[x['loss/total'] for x in _history(whole) if 'loss/total' in x][-1]!r}")


def test_f20_time_is_nearly_up(cluster, recipe, whole, tmp_path):
    """What `--signal=B:USR2@300` sends: the job saves, stops, requeues itself once, and leaves no process behind."""
    run = tmp_path / "run"
    job = _submit(recipe, run)
    _wait(lambda: _pruning(run, 8), run, 200, "the prune stage")
    ranks = _processes(run, "one") + _processes(run, "two")
    assert len(ranks) >= 2
    _command("scancel", "--signal=USR2", "--batch", job)
    _wait(lambda: "requeueing" in _logs(run), run, 60, "the requeue")
    assert "preempted, stage prune" in _logs(run)
    _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), run, 30, "the end of the ranks")
    _requeued(job, run, 90)
    _wait(lambda: _finished(run), run, 500, "the requeued chain")
    assert _job(job)["Restarts"] == "1"
    assert _logs(run).count("requeueing") == 1
    _assert_same(run, whole)


def test_f22_requeue_stops_at_its_limit(cluster, recipe, tmp_path):
    run = tmp_path / "run"
    job = _submit(recipe, run, DSPRUNE_MAX_RESTARTS="0")
    _wait(lambda: _status(run).get("state") == "running", run, 200, "the start")
    _command("scancel", "--signal=USR2", "--batch", job)
    _wait(lambda: "not requeued" in _logs(run), run, 90, "the end")
    assert "times already (DSPRUNE_MAX_RESTARTS): not requeued" in _logs(run)
    _wait(lambda: _job(job)["JobState"] == "FAILED", run, 30, "the job's end")
    assert _job(job)["ExitCode"] == "75:0"
    assert _job(job)["Restarts"] == "0"


def test_a_cancelled_job_stays_away(cluster, recipe, tmp_path):
    run = tmp_path / "run"
    job = _submit(recipe, run)
    _wait(lambda: _status(run).get("state") == "running", run, 200, "the start")
    _command("scancel", job)
    _wait(lambda: _job(job)["JobState"] == "CANCELLED", run, 60, "the job's end")
    time.sleep(3)
    assert _job(job)["JobState"] == "CANCELLED"
    assert "requeueing" not in _logs(run)


def test_a_node_goes_down(cluster, recipe, whole, tmp_path):
    """Its daemon and all of its processes die; SLURM requeues the job, and it goes on when the node is back."""
    run = tmp_path / "run"
    job = _submit(recipe, run)
    _wait(lambda: _pruning(run, 8), run, 200, "the prune stage")
    os.kill(int((cluster / "slurmd.two.pid").read_text()), signal.SIGKILL)
    for pid in _node_processes("two"):
        os.kill(pid, signal.SIGKILL)
    _command("scontrol", "update", "nodename=two", "state=down", "reason=dead")
    _command("slurmd", "-N", "two")
    _command("scontrol", "update", "nodename=two", "state=resume")
    _requeued(job, run, 120)
    _wait(lambda: _finished(run), run, 500, "the requeued chain")
    _assert_same(run, whole)


def _node_processes(node):
    """Step daemons and tasks of a node: what dies with it."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if path.name.isdigit() and (f"SLURMD_NODENAME={node}" in environment or f"slurmstepd_{node}" in command):
            found.append(int(path.name))
    return [pid for pid in found if pid != os.getpid()]


def test_deepspeeds_own_launcher(cluster, recipe, whole, tmp_path):
    """One launcher a node instead of one task a rank; the models are the same."""
    run = tmp_path / "run"
    _submit(recipe, run, DSPRUNE_LAUNCHER="deepspeed")
    _wait(lambda: _finished(run), run, 500, "the chain")
    _assert_same(run, whole)


def test_a_sweep_ends_in_a_table_and_a_picture(cluster, recipe, tmp_path):
    _command(
        ROOT / "slurm" / "sweep.sh",
        *("order", "cofi", "0.4 0.6", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"),
        *(f"--output={tmp_path}/job-%A-%a.log", "--", "log.tensorboard=false"),
        RECIPE=str(recipe),
        SWEEP="test",
        DSPRUNE_RUNS=str(tmp_path),
        DSPRUNE_ACTIVATE=ACTIVATE,
        DSPRUNE_HOME=str(ROOT),
    )
    folder = tmp_path / "sweep-test"
    _wait(
        lambda: (folder / "table.txt").exists() and "picture" in (folder / "table.txt").read_text(), tmp_path, 600, "it"
    )
    table = (folder / "table.txt").read_text()
    print(table)
    assert "cofi-order-0.4" in table
    assert "cofi-order-0.6" in table
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
