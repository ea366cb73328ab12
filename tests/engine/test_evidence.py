"""What a method sees of a step: against gradients taken by hand, and the same however a batch was cut."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from dsprune.structure import analyze, attach_gates, ones
from dsprune.tasks import build_task
from tests.helpers.models import tiny_model
from tests.helpers.settings import ROWS
from tests.helpers.training import RandomExamples, Setup, build_trainer, without_dropout
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist
FISHER = next(row for row in ROWS if row.name == "fisher")
WAYS = {
    "zero3 x2, nothing whole": (2, {"stage": 3, "accumulation": 2}),
    "zero2 x2": (2, {"stage": 2}),
    "zero0 x1 accumulating": (1, {"stage": 0, "accumulation": 4}),
}


@cache
def _reference():
    return run_world(_calibrated, 1, Setup(FISHER))[0]


def _calibrated(setup):
    """A trajectory, the weights that ask for gradients, and what was chosen, under ZeRO-3 with nothing kept whole."""
    import dsprune.engine.zero.config as ds_config
    from dsprune.engine.zero.gather import whole
    from dsprune.methods import state_of

    load = ds_config.load_ds_config

    def sharded(name):
        config = load(name)
        config.setdefault("zero_optimization", {})["stage3_param_persistence_threshold"] = 0
        return config

    if setup.stage == 3:
        ds_config.load_ds_config = sharded
    trainer = build_trainer(setup)
    module = trainer.engine.module
    before = {name: whole(module, name) for name, _ in module.named_parameters()}
    for step in range(trainer.total_steps):
        assert trainer.step(step).applied
    assert all(torch.equal(value, whole(module, name)) for name, value in before.items())
    assert not any(param.requires_grad or param.grad is not None for param in module.parameters())
    assert trainer.engine.basic_optimizer is None
    trainer.replica.check_equal(trainer.world, 0)
    method = trainer.replica.method
    return {
        "state": {name: value.numpy() for name, value in state_of(method).items()},
        "gates": {kind: gate.numpy() for kind, gate in method.select().gates.items()},
    }


def _by_hand():
    """Squares of the gradients of each example's loss, one after the other, of the same examples."""
    from dsprune.config import DataConfig, TaskConfig
    from dsprune.tasks.sampling import epoch_order

    model, data = without_dropout(tiny_model("bert")), RandomExamples()
    task = build_task(TaskConfig(name="sst2"), DataConfig(), seed=0)
    structure = analyze(model)
    gating = attach_gates(model, structure, empty="bias")
    order = epoch_order(data.lengths, batch_size=8, seed=0, epoch=0)[: FISHER.steps].flatten()
    sums = {
        kind: torch.zeros_like(gate, dtype=torch.float64) for kind, gate in ones(structure, ("head", "ffn_dim")).items()
    }
    for index in order.tolist():
        batch = data.collate([index])
        labels = batch.pop("labels")
        gates = {kind: gate.requires_grad_() for kind, gate in ones(structure, tuple(sums)).items()}
        gating.set(gates)
        loss = torch.nn.functional.cross_entropy(task.outputs(model(**batch)), labels)
        for kind, gradient in zip(sums, torch.autograd.grad(loss, list(gates.values())), strict=True):
            sums[kind] += gradient.double().square()
    return sums


def test_squares_are_sums_over_examples_of_squared_gradients():
    found = _reference()["state"]
    for kind, expected in _by_hand().items():
        np.testing.assert_allclose(found[f"importance.{kind}"], expected.numpy(), rtol=1e-4, err_msg=kind)


@pytest.mark.parametrize("way", WAYS)
def test_squares_do_not_depend_on_how_a_batch_is_cut(way):
    """The same selection, bit for bit, and scores that are equal to the rounding of their sum."""
    world_size, changes = WAYS[way]
    for result in run_world(_calibrated, world_size, Setup(FISHER).at(**changes)):
        for name, value in _reference()["state"].items():
            np.testing.assert_allclose(result["state"][name], value, rtol=1e-6, err_msg=name)
        for kind, gate in _reference()["gates"].items():
            np.testing.assert_array_equal(result["gates"][kind], gate, err_msg=kind)


def _losses_of_trials(setup):
    """Losses under two sets of gates, of a method that asks for nothing else."""
    trainer = build_trainer(setup)
    method = trainer.replica.method
    kinds = method.kinds
    closed = {kind: gate.clone() for kind, gate in ones(method.structure, kinds).items()}
    closed["ffn_dim"][0, ::2] = 0
    sets = [ones(method.structure, kinds), closed]
    method.gates = lambda step: {kind: torch.stack([one[kind] for one in sets]) for kind in kinds}
    method.evidence = lambda step: "loss"
    found = []
    method.learn = lambda step, gates, seen: found.append(seen)
    result = trainer.step(0)
    assert list(found[0]) == ["loss"]
    return found[0]["loss"].tolist(), result.losses["total"]


def test_losses_of_trials_are_means_over_the_examples_of_a_step():
    (both, total), *_ = run_world(_losses_of_trials, 1, Setup(FISHER))
    assert both[0] == pytest.approx(total)
    assert both[1] != pytest.approx(both[0])
    for other, _ in run_world(_losses_of_trials, 2, Setup(FISHER, stage=3, accumulation=2)):
        assert other == pytest.approx(both, rel=1e-5)


def _seen_while_training(setup):
    """Squares and losses that a method which trains weights asks for: what it sees, and the losses of its training."""
    trainer = build_trainer(setup)
    method, found, wanted = trainer.replica.method, [], ["gradient", "squares", "probe", "loss"]
    learn, evidence = method.learn, lambda step: wanted[step]
    method.evidence = evidence
    gates = method.gates
    method.gates = lambda step: (
        {kind: gate[None].expand(2, *gate.shape) for kind, gate in gates(step).items()}
        if wanted[step] == "loss"
        else gates(step)
    )

    def keep(step, current, seen):
        found.append({name: value.double().sum().item() for name, value in seen.items()})
        if wanted[step] in ("gradient", "probe"):
            learn(step, current, seen)

    method.learn = keep
    losses = [trainer.step(step).losses["total"] for step in range(len(wanted))]
    return found, losses


def test_a_method_that_trains_weights_sees_the_same_at_every_stage():
    row = next(row for row in ROWS if row.name == "mlpruning")
    (found, losses), *_ = run_world(_seen_while_training, 1, Setup(row))
    assert all(value != 0 for seen in found for value in seen.values())
    for others, theirs in run_world(_seen_while_training, 2, Setup(row, stage=3, accumulation=2)):
        assert theirs == pytest.approx(losses, rel=2e-5)
        for seen, expected in zip(others, found, strict=True):
            assert seen == pytest.approx(expected, rel=1e-3, abs=1e-6)
