"""Faults 19, 21: asked to stop, at every kind of place, on either rank or both; and by file and clock."""

import json
import os
import signal
import time

import pytest

from tests.helpers.runs import assert_same, checkpoints, execute, status, words
from tests.helpers.world import run_to_the_end, run_world

pytestmark = pytest.mark.dist
SIGNALS = {name: getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2")}


def _ask(how, run, ranks):
    """Ask this rank to stop, if it is one of those that are asked."""
    if int(os.environ["RANK"]) not in ranks:
        return
    (run / "fired").write_text(str(time.monotonic()))
    if how in SIGNALS:
        os.kill(os.getpid(), SIGNALS[how])
    elif how == "STOP":
        (run / "STOP").touch()


def _asked_while(place, how, ranks, run, *words):
    """A run that is asked to stop while it trains, evaluates, saves, or starts."""
    from dsprune.engine.checkpoints import store as checkpoint
    from dsprune.engine.learning.trainer import Trainer
    from dsprune.run import session
    from dsprune.run.training import scoring

    def before(owner, name, when):
        real = getattr(owner, name)

        def asking(*args, **kwargs):
            if when(*args):
                _ask(how, run, ranks)
            return real(*args, **kwargs)

        setattr(owner, name, asking)

    if place == "training":
        before(Trainer, "_micro_step", lambda self, step, *_: step == 2)
    elif place == "evaluating":
        before(scoring, "evaluate_all", lambda *_: True)
    elif place == "saving":
        before(checkpoint, "reached", lambda point: point == "hashed")
    elif place == "starting":
        before(session, "run_stage", lambda *_: True)
    return execute(*words)


# Where it is asked -> the step that is saved then; None: nothing was trained yet.
SAVED = {"training": 3, "evaluating": 4, "saving": 2, "starting": None}
QUICK = [("SIGTERM", (1,), "training"), ("STOP", (0,), "evaluating"), ("SIGUSR2", (0, 1), "saving")]
REST = [
    (how, ranks, where)
    for where in SAVED
    for how, ranks in (("SIGTERM", (0,)), ("SIGTERM", (0, 1)), ("SIGUSR1", (1,)), ("SIGUSR2", (1,)), ("STOP", (0,)))
    if (how, ranks, where) not in QUICK
]
CASES = [
    *(pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}") for case in QUICK),
    *(pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}", marks=pytest.mark.faults) for case in REST),
]


@pytest.mark.parametrize(("how", "ranks", "where"), CASES)
def test_f19_stop(place, undisturbed, tmp_path, how, ranks, where):
    run = tmp_path / "run"
    run.mkdir()
    launch = words(place, run)
    assert run_world(_asked_while, 2, where, how, ranks, run, *launch) == [75, 75]
    latency = os.stat(run / "status.json").st_mtime - os.stat(run / "fired").st_mtime
    print(f"stop latency, {where}, {how} on {ranks}: {latency:.2f} s")
    said = status(run)
    reason = {"STOP": "STOP file"}.get(how, how)
    assert said["state"] == "preempted"
    assert said["exit_code"] == 75
    assert reason in said["reason"]
    assert not (run / "STOP").exists(), "the next launch would stop as well"
    assert not (run / "LOCK").exists()
    step = SAVED[where]
    assert checkpoints(run)[-1:] == ([f"step-{step:08d}"] if step else [])
    assert run_world(execute, 2, *launch) == [0, 0]
    assert status(run)["state"] == "done"
    assert_same(run, undisturbed())


def _asked_in_every_stage(stage, how, run, *words):
    from dsprune.engine.learning.trainer import Trainer
    from dsprune.run import exporting

    real_step, real_poll = Trainer.step, exporting.start_export

    def step(self, number):
        if self.stage == stage and number == 1:
            _ask(how, run, (1,))
        return real_step(self, number)

    def start_export(*args):
        _ask(how, run, (0,))
        return real_poll(*args)

    Trainer.step = step
    if stage == "consolidate":
        exporting.start_export = start_export
    return execute(*words)


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["teacher", "prune", "consolidate", "recover"])
def test_f19_stop_in_every_stage(place, tmp_path, stage):
    """A whole run, stopped in one of its stages, ends with the report of the run that was not."""
    recipe = str(place / "cofi.toml") if (place / "cofi.toml").exists() else words(place, tmp_path / "unused")[0]
    whole, run = tmp_path / "whole", tmp_path / "run"
    run.mkdir()
    common = (recipe, "log.tensorboard=false", "teacher.duration=3 steps", "recover.duration=3 steps")
    assert run_world(execute, 2, *common, f"output={whole}") == [0, 0]
    assert run_world(_asked_in_every_stage, 2, stage, "SIGTERM", run, *common, f"output={run}") == [75, 75]
    assert (run / "fired").exists()
    assert run_world(execute, 2, *common, f"output={run}") == [0, 0]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, run)]
    for kind in ("dense", "compact"):
        assert reports[0][kind]["metrics"] == reports[1][kind]["metrics"]
        assert reports[0][kind]["parameters"] == reports[1][kind]["parameters"]
    last = max((whole / "recover" / "checkpoints").glob("step-*")).relative_to(whole)
    from dsprune.consolidate import open_checkpoint

    weights = [open_checkpoint(folder / last) for folder in (whole, run)]
    assert all((weights[0].read(name) == weights[1].read(name)).all() for name in weights[0].names())


def test_f19_time_limit(place, tmp_path):
    run = tmp_path / "run"
    assert run_world(execute, 2, *words(place, run), "cluster.time_limit_minutes=1e-6") == [75, 75]
    assert "time limit" in status(run)["reason"]


def test_f19_seconds_left_before_the_end_of_a_slurm_job(monkeypatch):
    from dsprune.engine.ranks.stop import seconds_left

    assert seconds_left(None, 5.0) is None
    assert seconds_left(2.0, 5.0) == 120.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert seconds_left(None, 5.0) == pytest.approx(3300, abs=2)
    assert seconds_left(10.0, 5.0) == 600.0


def _asked_twice(run, *words):
    from dsprune.engine.checkpoints import store as checkpoint

    real = checkpoint.reached

    def twice(point):
        if point in ("cleared", "hashed"):
            _ask("SIGTERM", run, (0, 1))
        return real(point)

    checkpoint.reached = twice
    return execute(*words)


@pytest.mark.faults
def test_f21_second_signal_while_saving(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert run_world(_asked_twice, 2, run, *words(place, run)) == [75, 75]
    assert checkpoints(run) == ["step-00000002"]
    assert run_world(execute, 2, *words(place, run)) == [0, 0]
    assert_same(run, undisturbed())


def _asked_before_anything(run, *words):
    from dsprune.engine.ranks import world

    real = world.start_world

    def asked(*args):
        _ask("SIGTERM", run, (1,))
        return real(*args)

    world.start_world = asked
    return execute(*words)


def test_f21_signal_before_the_first_step(place, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    ending = run_to_the_end(_asked_before_anything, 2, run, *words(place, run))
    assert ending.codes == [75, 75]
    assert (run / "fired").exists()
    assert checkpoints(run) == []
