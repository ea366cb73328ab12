"""Faults 1, 2, 3, 5, 6: a rank is killed, hangs or fails; at named points of a save, or at random times."""

import os
import random
import re
import shutil
import signal
import time

import pytest

from dsprune.engine.checkpoints.store import POINTS
from tests.helpers.runs import STEPS, assert_same, checkpoints, execute, status, words
from tests.helpers.world import run_to_the_end, run_world

pytestmark = pytest.mark.dist
KILLED = -signal.SIGKILL


def _killed_in_step(step, rank, *words):
    from dsprune.engine.learning.trainer import Trainer

    real = Trainer._micro_step

    def micro_step(self, number, *args, **kwargs):
        if number == step and self.world.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, number, *args, **kwargs)

    Trainer._micro_step = micro_step
    return execute(*words)


@pytest.mark.parametrize("rank", [0, 1])
def test_f01_kill_in_a_step(place, undisturbed, tmp_path, rank):
    run = tmp_path / "run"
    ending = run_to_the_end(_killed_in_step, 2, 3, rank, *words(place, run))
    assert ending.codes[rank] == KILLED
    assert ending.codes[1 - rank] == 69, ending.log
    assert ending.seconds < 15
    assert checkpoints(run) == ["step-00000002"]
    if rank == 1:
        assert status(run)["state"] == "failed"
        assert "another rank is gone" in status(run)["reason"]
    else:
        assert status(run)["state"] == "running", "who was killed can write no more"
    assert run_world(execute, 2, *words(place, run)) == [0, 0]
    assert_same(run, undisturbed())


def _killed_at(point, ranks, occasion, *words):
    from dsprune.engine.checkpoints import store as checkpoint

    passed = []

    def reached(name):
        passed.append(name)
        if name == point and passed.count(name) == occasion and int(os.environ["RANK"]) in ranks:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.reached = reached
    return execute(*words)


KILLS = [(point, ranks) for point in POINTS for ranks in ((0,), (1,), (0, 1))]
QUICK = [("own shard written", (1,)), ("manifest written", (0,)), ("committed", (0, 1))]


@pytest.mark.parametrize(
    ("point", "ranks"),
    [
        pytest.param(*kill, id=f"{kill[0]}-{kill[1]}", marks=() if kill in QUICK else pytest.mark.faults)
        for kill in KILLS
    ],
)
def test_f02_kill_at_each_point_of_a_save(place, undisturbed, tmp_path, point, ranks):
    """In the third save of three, which is also the first that retires one."""
    run = tmp_path / "run"
    ending = run_to_the_end(_killed_at, 2, point, ranks, 3, *words(place, run))
    # Where both are to die, the first to go may tear the other out of the collective before its point.
    dead = [rank for rank in ranks if ending.codes[rank] == KILLED]
    assert dead, f"no rank of {ranks} came to '{point}'\n{ending.log}"
    assert len(ranks) == 2 or ending.codes[1 - ranks[0]] == 69, ending.log
    # The new one counts once it has its name, and the one before is there in any case.
    assert set(checkpoints(run)) & {"step-00000004", "step-00000006"}
    assert run_world(execute, 2, *words(place, run)) == [0, 0]
    assert checkpoints(run)[-2:] == ["step-00000004", "step-00000006"]
    assert_same(run, undisturbed())


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
def test_f02_kill_in_the_first_save(place, undisturbed, tmp_path, point):
    """Until the first checkpoint is committed a run begins anew, and says so."""
    run = tmp_path / "run"
    assert KILLED in run_to_the_end(_killed_at, 2, point, (0,), 1, *words(place, run)).codes
    ending = run_to_the_end(execute, 2, *words(place, run))
    assert ending.codes == [0, 0], ending.log
    if POINTS.index("cleared") <= POINTS.index(point) < POINTS.index("committed"):
        assert "a save of step-00000002 was cut off and is discarded" in ending.log
    assert_same(run, undisturbed())


def _points_of_a_run(*words):
    from dsprune.engine.checkpoints import store as checkpoint

    passed = []
    checkpoint.reached = passed.append
    return execute(*words), passed


def test_f02_every_point_is_passed_by_every_rank_in_order(place, tmp_path):
    for code, passed in run_world(_points_of_a_run, 2, *words(place, tmp_path / "run")):
        assert code == 0
        assert passed == list(POINTS) * (STEPS // 2)


@pytest.mark.faults
def test_f03_random_kills(place, undisturbed, request, capsys, tmp_path):
    """At any time of a launch, either rank or both; in a row, until the run is through. Nothing may be lost."""
    kills = request.config.getoption("kills") if "faults" in request.config.getoption("markexpr") else 2
    seed = request.config.getoption("kill_seed")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    rng = random.Random(seed)
    print(f"seed {seed}")  # shown where the test fails
    fired = finished = unresumable = same = 0
    began = time.monotonic()
    while fired < kills:
        student = f"zero{rng.randint(1, 3)}" if kills > 2 else "zero2"
        reference = undisturbed(student=student)
        run = tmp_path / f"run{finished}"
        while True:
            delay, ranks = rng.uniform(0.2, 3.5), rng.choice([(0,), (1,), (0, 1)])

            def kill(pids, delay=delay, ranks=ranks):
                time.sleep(delay)
                for rank in ranks:
                    try:
                        os.kill(pids[rank], signal.SIGKILL)
                    except ProcessLookupError:
                        return

            ending = run_to_the_end(
                execute, 2, *words(place, run, student=student), meddle=kill if fired < kills else lambda pids: None
            )
            if KILLED in ending.codes:
                fired += 1
            elif ending.codes == [0, 0]:
                break
            else:
                unresumable += 1
                shutil.copytree(run, f"{run}-unresumable-{fired}")
                pytest.fail(f"seed {seed}, after {fired} kills: ended with {ending.codes}\n{ending.log}")
        finished += 1
        assert_same(run, reference)
        same += 1
        shutil.rmtree(run)
    with capsys.disabled():
        print(
            f"\nkill campaign: seed {seed}, {fired} kills in {finished} runs, {unresumable} unresumable, "
            f"{same} bitwise equal, {time.monotonic() - began:.0f} s; replay with --kills {kills} --kill-seed {seed}"
        )


def _hangs(step, *words):
    from dsprune.engine.learning.trainer import Trainer

    real = Trainer._micro_step

    def micro_step(self, number, *args, **kwargs):
        if number == step and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(self, number, *args, **kwargs)

    Trainer._micro_step = micro_step
    return execute(*words)


@pytest.mark.faults
def test_f05_hung_rank(place, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.helpers.world.COLLECTIVE_TIMEOUT", 10.0)
    run = tmp_path / "run"

    def wake_for_the_end(pids):
        """The hung rank is killed once the other has left, or the test would wait for it."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (run / "status.json").exists():
            time.sleep(0.1)
        while time.monotonic() < deadline and status(run)["state"] == "running":
            time.sleep(0.1)
        os.kill(pids[1], signal.SIGKILL)

    ending = run_to_the_end(_hangs, 2, 3, *words(place, run), "cluster.timeout_minutes=0.15", meddle=wake_for_the_end)
    assert ending.codes == [69, KILLED], ending.log
    reason = status(run)["reason"]
    assert "hung for longer than cluster.timeout_minutes" in reason
    assert "rank 1 (process " in reason
    assert re.search(r"was last heard of \d+ s ago, at .*; rank 0 (is at|waits in) .*prune step 3", reason)
    assert "trainer.py" in (run / "stacks" / "rank0.txt").read_text(encoding="utf-8")
    waited = status(run)["written"] - (run / "metrics.jsonl").stat().st_mtime
    assert waited < 10 + 5 + 5, "time-out, last words, and some"
    assert run_world(execute, 2, *words(place, run)) == [0, 0]
    assert_same(run, undisturbed())


def _fails_on_one(step, rank, *words):
    from dsprune.methods.cofi import CoFi

    real = CoFi.learn

    def learn(self, number, *args):
        if number == step and int(os.environ["RANK"]) == rank:
            raise ZeroDivisionError("a reason of its own")
        return real(self, number, *args)

    CoFi.learn = learn
    return execute(*words)


@pytest.mark.parametrize("rank", [0, 1])
def test_f06_exception_on_one_rank(place, undisturbed, tmp_path, rank):
    run = tmp_path / "run"
    ending = run_to_the_end(_fails_on_one, 2, 3, rank, *words(place, run))
    assert ending.codes == [70, 70], ending.log
    assert "a reason of its own" in status(run)["reason"]
    if rank == 1:
        assert "rank 1 failed: ZeroDivisionError: a reason of its own" in status(run)["reason"]
    assert run_world(execute, 2, *words(place, run)) == [0, 0]
    assert_same(run, undisturbed())
