"""A hang explains itself: heartbeats of many ranks, and of two real ones of which one is stopped."""

import os
import signal
import time

import pytest

from dsprune.engine.ranks.pulse import (
    STALE_SECONDS,
    Beat,
    Heartbeat,
    Place,
    Pulse,
    ask_for_stacks,
    describe_ranks,
    read_beats,
    suspects,
)
from dsprune.files import write_json
from dsprune.run_folder import RunFolder

NOW = 1_000_000.0


def _beat(
    rank, *, step=7, age=1.0, collective="summing gate gradients and losses", phase="after backward", waited=90.0
):
    return Beat(rank, f"node{rank // 8}", 4000 + rank, NOW - age, Place("prune", step, phase, collective, NOW - waited))


def test_sixty_four_ranks_of_which_one_is_silent():
    beats = [_beat(rank) for rank in range(64)]
    beats[17] = _beat(17, age=200.0, collective=None, phase="backward", waited=201.0)
    told = describe_ranks(beats, NOW)
    assert "rank 17 (process 4017 on node2) was last heard of 3.3 min ago, at prune step 7, backward" in told
    assert "63 rank(s) wait in 'summing gate gradients and losses' (prune step 7, after backward) since 90 s" in told


@pytest.mark.parametrize(
    ("odd", "names"),
    [
        ({"collective": None, "phase": "forward"}, [3]),  # computes, or loops, while the others wait
        ({"step": 6}, [3]),  # waits in the collective of the step before
    ],
)
def test_a_rank_that_beats_can_be_the_one_that_is_missing(odd, names):
    beats = [_beat(rank) for rank in range(8)]
    beats[3] = _beat(3, **odd)
    assert [beat.rank for beat in suspects(beats, NOW)] == names
    assert "rank 3" in describe_ranks(beats, NOW)


def test_a_healthy_run_has_nothing_to_say():
    beats = [_beat(rank, waited=0.2) for rank in range(4)]
    beats[1] = _beat(1, collective=None, waited=0.2)
    assert describe_ranks(beats, NOW, patience=STALE_SECONDS) == ""
    assert describe_ranks([], NOW) == ""


def test_heartbeats_of_sixty_four_ranks_are_read_back(tmp_path):
    folder = RunFolder(tmp_path)
    folder.heartbeats.mkdir()
    for rank in range(64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dsprune.engine.ranks.pulse.pulse", Pulse())
            Heartbeat(folder, rank).beat()
    folder.heartbeat(5).write_text("{ half of", encoding="utf-8")
    write_json(folder.heartbeat(6), {"rank": 6})
    assert [beat.rank for beat in read_beats(folder)] == [rank for rank in range(64) if rank not in (5, 6)]


def test_an_open_collective_is_noted_and_stays_when_it_fails():
    here = Pulse()
    here.at(stage="prune", step=3, phase="forward")
    with here.waiting("hashing"):
        assert here.place.collective == "hashing"
        assert here.place.step == 3
    assert here.place.collective is None

    def fails():
        with here.waiting("hashing"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert here.place.collective == "hashing"


def test_stacks_on_request_and_by_signal(tmp_path, monkeypatch):
    monkeypatch.setattr("dsprune.engine.ranks.pulse.INTERVAL_SECONDS", 0.05)
    folder = RunFolder(tmp_path)
    with Heartbeat(folder, 3):
        os.kill(os.getpid(), signal.SIGQUIT)
        ask_for_stacks(folder)
        deadline = time.monotonic() + 10
        while "--- rank 3" not in folder.stacks(3).read_text(encoding="utf-8") and time.monotonic() < deadline:
            time.sleep(0.02)
    text = folder.stacks(3).read_text(encoding="utf-8")
    assert text.count("test_stacks_on_request_and_by_signal") == 2
    assert "--- rank 3" in text


def test_noting_a_place_costs_next_to_nothing():
    """About ten notes a step: under a thousandth of a step of 50 ms is 5 us each; allow for a busy machine."""
    here = Pulse()
    began = time.perf_counter()
    for step in range(2000):
        here.at(stage="prune", step=step, phase="forward")
    assert (time.perf_counter() - began) / 2000 < 50e-6
