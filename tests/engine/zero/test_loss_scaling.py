"""fp16 loss scaling and the replicated state: nothing scaled, nothing that is not finite ever reaches it."""

import numpy as np
import pytest

from dsprune.methods import state_of
from tests.helpers.settings import ROWS, TRAINED
from tests.helpers.training import Setup, build_trainer, spoiled, trajectory
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist
GRAIN = next(row for row in ROWS if row.name == "grain")


def _allow_fp16():
    """DeepSpeed does not offer fp16 on most CPUs; the arithmetic works, and so does its loss scaling."""
    from deepspeed.accelerator import get_accelerator

    import dsprune.engine.zero.config

    dsprune.engine.zero.config._check_device = lambda config: None
    type(get_accelerator()).is_fp16_supported = lambda self: True


def _fp16_trajectory(setup):
    _allow_fp16()
    return trajectory(setup)


def _overflow(setup):
    """Importance after two good steps, after one that overflows, and after a good one."""
    _allow_fp16()
    trainer = build_trainer(setup)
    states, applied = [], []
    for step in range(4):
        if step == 2:
            teach = trainer.teacher.teach
            trainer.teacher.teach = spoiled(teach, float("inf"))
        if step == 3:
            trainer.teacher.teach = teach
        applied.append(trainer.step(step).applied)
        states.append({k: v.numpy().copy() for k, v in state_of(trainer.replica.method).items()})
    return applied, states


@pytest.mark.parametrize("row", TRAINED, ids=[row.name for row in TRAINED])
def test_fp16_follows_fp32(row):
    """A gradient that kept its loss scale would be 2^16 times too large."""
    reference = run_world(trajectory, 1, Setup(row))[0]
    results = run_world(_fp16_trajectory, 2, Setup(row, stage=2, precision="fp16", accumulation=2))
    assert len({result["fingerprint"] for result in results}) == 1
    for name, value in reference["state"].items():
        ours = results[0]["state"][name]
        if name.startswith("importance"):
            assert np.median(np.abs(ours - value)) <= 0.05 * np.abs(value).max(), name
        assert np.isfinite(ours).all()
    for ours, theirs in zip(results[0]["losses"], reference["losses"], strict=True):
        assert ours["total"] == pytest.approx(theirs["total"], rel=0.05)


def test_a_skipped_step_leaves_no_trace_in_the_scores():
    for applied, states in run_world(_overflow, 2, Setup(GRAIN, stage=2, precision="fp16")):
        assert applied == [True, True, False, True]
        for name in states[1]:
            assert np.array_equal(states[1][name], states[2][name]), name
            assert np.isfinite(states[3][name]).all()
        assert any(not np.array_equal(states[2][name], states[3][name]) for name in states[2])
