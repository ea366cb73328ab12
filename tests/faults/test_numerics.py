"""Faults 12 to 16: what is not finite, out of range or not the same on all ranks stops the run and is not saved."""

import json
import os

import pytest
import torch

from dsprune.engine.learning import guard
from dsprune.errors import NumericsError
from tests.helpers.runs import assert_same, checkpoints, execute, status, words
from tests.helpers.world import run_to_the_end, run_world

pytestmark = pytest.mark.dist


def _not_finite(what, steps, *words):
    """On rank 1 a loss, or a gradient of the weights, is not a number at some steps."""
    from dsprune.engine.learning.student import Student
    from dsprune.engine.learning.trainer import Trainer

    real, forward = Trainer._micro_step, Student.forward
    spoilt = []

    def micro_step(self, number, *args, **kwargs):
        spoilt[:] = [True] if self.stage == "prune" and self.world.rank == 1 and number in steps else []
        return real(self, number, *args, **kwargs)

    def spoil(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if not spoilt or len(out) == 1:
            return out
        total, parts, distances = out
        nan = float("nan")
        if what == "loss":
            return total * nan, parts * nan, distances
        total.register_hook(lambda gradient: gradient * nan)
        return total * 1.0, parts, distances

    Trainer._micro_step, Student.forward = micro_step, spoil
    return execute(*words)


@pytest.mark.parametrize(
    "student",
    ["zero2", *(pytest.param(s, marks=pytest.mark.faults) for s in ("zero0", "zero1", "zero3", "zero2_bf16"))],
)
def test_f12_loss_not_finite_once(place, undisturbed, tmp_path, student):
    run = tmp_path / "run"
    ending = run_to_the_end(_not_finite, 2, "loss", {3}, *words(place, run, student=student))
    assert ending.codes == [66, 66], ending.log
    assert "prune step 3: not finite on rank 1" in ending.log
    assert "nothing was saved, the newest checkpoint is" in ending.log
    assert "step-00000002" in ending.log
    assert checkpoints(run) == ["step-00000002"]
    details = json.loads((run / "numerics.json").read_text())
    assert list(details["ranks"]) == ["1"]
    assert len(details["ranks"]["1"]["examples"]) == 4
    assert status(run)["exit_code"] == 66
    assert run_world(execute, 2, *words(place, run, student=student)) == [0, 0]
    assert_same(run, undisturbed(student=student))


@pytest.mark.parametrize(
    "student",
    ["zero0", "zero3", *(pytest.param(s, marks=pytest.mark.faults) for s in ("zero1", "zero2", "zero2_bf16"))],
)
def test_f12_gradients_not_finite_are_never_saved(place, undisturbed, tmp_path, student):
    """The losses are fine, and in fp32 DeepSpeed applies such a step without a word."""
    run = tmp_path / "run"
    ending = run_to_the_end(_not_finite, 2, "gradient", {3}, *words(place, run, student=student))
    assert ending.codes == [66, 66], ending.log
    assert checkpoints(run) == ["step-00000002"]
    assert run_world(execute, 2, *words(place, run, student=student)) == [0, 0]
    assert_same(run, undisturbed(student=student))


def test_f13_not_finite_for_ever(place, tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        ending = run_to_the_end(_not_finite, 2, "loss", range(1, 100), *words(place, run))
        assert ending.codes == [66, 66]
        assert "there is no checkpoint yet" in ending.log
        assert checkpoints(run) == []


class _Fp16Engine:
    """The part of an fp16 engine that skips steps; real fp16 needs a GPU (tests/engine/test_gpu.py)."""

    def __init__(self, overflows):
        self.overflows = iter(overflows)
        self.scale = 2.0**16


def test_f14_fp16_overflow_is_given_a_chance():
    """Twenty-five steps in a row may be skipped in fp16, none in other precisions."""
    engine, skipped = _Fp16Engine([True] * 25 + [False]), 0
    for overflow in engine.overflows:
        skipped = skipped + 1 if overflow else 0
        engine.scale = engine.scale / 2 if overflow else engine.scale
        guard.check_skipped("prune step 1", skipped, fp16=True)
    assert skipped == 0
    with pytest.raises(NumericsError, match=r"skipped 26 step\(s\) in a row"):
        guard.check_skipped("prune step 1", 26, fp16=True)
    with pytest.raises(NumericsError, match=r"skipped 1 step\(s\) in a row"):
        guard.check_skipped("prune step 1", 1, fp16=False)


def _skipping(overflows, *words):
    """An engine that skips some steps: the schedule and the gates must not move on without it."""
    from dsprune.engine.learning.replica import Replica
    from dsprune.engine.learning.trainer import Trainer

    applied, after, step = [], Trainer._after, Replica.step

    def skip(self, number, reduced, was_applied, *seen):
        if self.stage != "prune":
            after(self, number, reduced, was_applied, *seen)
            applied.clear()  # those of the rehearsal
        elif number in overflows:
            before = self.replica.fingerprint()
            self.skipped -= 1  # the budget of fp32 is none
            after(self, number, reduced, False, *seen)
            assert self.replica.fingerprint() == before, "the gates moved in a step that was skipped"
        else:
            after(self, number, reduced, was_applied, *seen)

    Trainer._after = skip
    Replica.step = lambda self, number, grads: (applied.append(number), step(self, number, grads))[1]
    return execute(*words), applied


def test_f14_a_skipped_step_moves_no_gate(place, tmp_path):
    for code, applied in run_world(_skipping, 2, {2, 3}, *words(place, tmp_path / "run")):
        assert code == 0
        assert applied == [0, 1, 4, 5]


def _explodes(kind, value, *words):
    from dsprune.methods.cofi import CoFi

    real = CoFi.after_step

    def after_step(self):
        real(self)
        self.done = getattr(self, "done", 0) + 1
        if self.done == 3:
            with torch.no_grad():
                self.parameters()[kind].view(-1)[1] = value

    CoFi.after_step = after_step
    return execute(*words)


def test_f15_gate_explosion(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    ending = run_to_the_end(_explodes, 2, "log_alpha.ffn_dim", float("nan"), *words(place, run))
    assert ending.codes == [66, 66], ending.log
    assert "'log_alpha.ffn_dim' at layer 0, unit 1 is nan" in ending.log
    assert checkpoints(run) == ["step-00000002"]
    assert run_world(execute, 2, *words(place, run)) == [0, 0]
    assert_same(run, undisturbed())


@pytest.mark.parametrize(
    ("gates", "state", "message"),
    [
        ({"head": torch.tensor([[1.0, 0.5], [1e30, 1.0]])}, {}, "'head' at layer 1, unit 0 is 1e"),
        ({"hidden": torch.tensor([1.0, -0.1])}, {}, "'hidden' at unit 1 is -0.1"),
        ({"attn": torch.tensor([1.0, 2.0])}, {}, "'attn' at layer 1 is 2"),
        ({}, {"multiplier.linear": torch.tensor(float("inf"))}, "'multiplier.linear' at its only value is inf"),
    ],
)
def test_f15_gates_out_of_range_are_named(gates, state, message):
    with pytest.raises(NumericsError) as caught:
        guard.check_gates("prune step 3", gates, state)
    assert message in str(caught.value)


def _disagrees(*words):
    from dsprune.methods.cofi import CoFi

    real = CoFi.after_step

    def after_step(self):
        real(self)
        self.done = getattr(self, "done", 0) + 1
        if self.done == 3 and os.environ["RANK"] == "1":
            with torch.no_grad():
                self.log_alpha["head"][0, 0] -= 1e-3

    CoFi.after_step = after_step
    return execute(*words)


def test_f16_ranks_disagree(place, undisturbed, tmp_path):
    """At the next commit, long before the check that comes every hundred steps."""
    run = tmp_path / "run"
    ending = run_to_the_end(_disagrees, 2, *words(place, run))
    assert ending.codes == [66, 66], ending.log
    assert "step 4: gates and multipliers on rank 1 differ from rank 0's" in ending.log
    assert checkpoints(run) == ["step-00000002"]
    assert run_world(execute, 2, *words(place, run)) == [0, 0]
    assert_same(run, undisturbed())
