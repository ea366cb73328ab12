"""Invariants 4 and 5: one trajectory whatever stage, world size and accumulation; replicas equal bit by bit."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from dsprune.methods import METHODS, state_of
from tests.helpers.settings import BLOCKS, ROWS
from tests.helpers.training import Setup, build_trainer, spoiled, trajectory, under_autocast
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


GOLDEN = {
    "cofi": [0.587412, 0.572514, 0.240583, 0.352365, 0.314858, 0.235096],
    "grain": [0.689797, 0.666340, 0.644862, 0.612597, 0.610400, 0.603881],
    "mlpruning": [0.703689, 0.670607, 0.655227, 0.589773, 0.607689, 0.582197],
    "fisher": [0.661399, 0.663747, 0.733617],
    "blocks": [0.623569, 0.590192, 0.570479, 0.517833, 0.516508, 0.508909],
}
"""Losses of the first steps of every row: a change of these is a change of what is trained, and is to be meant."""
CALIBRATED = {"importance.head": 0.016351, "importance.ffn_dim": 0.111027}
"""Of a method that trains nothing, whose losses say nothing of it: sums of its scores."""


def test_every_method_has_a_row():
    assert {row.name for row in ROWS} == set(METHODS) == set(GOLDEN) - {"blocks"}


@pytest.mark.parametrize("row_index", range(len(ROWS)), ids=[row.name for row in ROWS])
def test_losses_are_those_that_they_were(row_index):
    result = _reference(row_index, "bert")
    assert [losses["total"] for losses in result["losses"]] == pytest.approx(GOLDEN[ROWS[row_index].name], rel=1e-4)
    if ROWS[row_index].name == "fisher":
        assert {name: value.sum() for name, value in result["state"].items()} == pytest.approx(CALIBRATED, rel=1e-3)


@cache
def _reference(row_index: int, family: str):
    return run_world(trajectory, 1, Setup(ROWS[row_index], family=family))[0]


def _assert_same(result, reference, *, rtol):
    for step, (ours, theirs) in enumerate(zip(result["losses"], reference["losses"], strict=True)):
        for part, value in theirs.items():
            assert ours[part] == pytest.approx(value, rel=rtol, abs=1e-6), f"step {step}, {part}"
    for name, value in reference["state"].items():
        np.testing.assert_allclose(result["state"][name], value, rtol=rtol, atol=1e-4, err_msg=name)


VARIANTS = [
    pytest.param(1, {"stage": 0, "accumulation": 2}, id="zero0 x1 accumulating"),
    pytest.param(1, {"stage": 3}, id="zero3 x1"),
    pytest.param(2, {"stage": 0}, id="zero0 x2"),
    pytest.param(2, {"stage": 1, "accumulation": 2}, id="zero1 x2 accumulating"),
    pytest.param(2, {"stage": 2}, id="zero2 x2"),
    pytest.param(2, {"stage": 2, "accumulation": 4}, id="zero2 x2 accumulating"),
    pytest.param(2, {"stage": 3, "teacher": "teacher_zero3"}, id="zero3 x2, sharded teacher"),
    pytest.param(2, {"stage": 3, "accumulation": 2}, id="zero3 x2 accumulating"),
    pytest.param(2, {"stage": 3, "activation_checkpointing": True}, id="zero3 x2 checkpointing"),
]


def _ways(row_index):
    """All ways of running; where no weight trains, one of each kind of engine by default."""
    quick = ("zero3 x2 accumulating", "zero2 x2") if not ROWS[row_index].trains else None
    for way in VARIANTS:
        marks = () if quick is None or way.id in quick else pytest.mark.slow
        yield pytest.param(row_index, *way.values, id=f"{way.id}-{ROWS[row_index].name}", marks=marks)


@pytest.mark.parametrize(
    ("row_index", "world_size", "changes"), [way for row_index in range(len(ROWS)) for way in _ways(row_index)]
)
def test_every_way_of_running_is_one_trajectory(row_index, world_size, changes):
    reference = _reference(row_index, "bert")
    results = run_world(trajectory, world_size, Setup(ROWS[row_index]).at(**changes))
    assert len({result["fingerprint"] for result in results}) == 1
    _assert_same(results[0], reference, rtol=2e-5)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra-projected"])
def test_every_family_is_one_trajectory(family):
    results = run_world(trajectory, 2, Setup(ROWS[0], stage=3, accumulation=2, family=family))
    _assert_same(results[0], _reference(0, family), rtol=2e-5)


@pytest.mark.parametrize(("row_index", "family"), [(1, "gpt2-sequence"), (2, "llama-sequence")])
def test_decoders_are_one_trajectory(row_index, family):
    """Weights stored the other way round, and heads that share keys and values, whose attention maps distil."""
    results = run_world(trajectory, 2, Setup(ROWS[row_index], stage=3, accumulation=2, family=family))
    _assert_same(results[0], _reference(row_index, family), rtol=2e-5)


def _with_nothing_kept_whole(setup):
    """A trajectory under ZeRO-3 that shards even the smallest weight. Runs on every rank."""
    import dsprune.engine.zero.config as ds_config

    load = ds_config.load_ds_config

    def sharded(name):
        config = load(name)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    ds_config.load_ds_config = sharded
    return trajectory(setup)


@pytest.mark.parametrize(
    ("row_index", "family"), [(0, "deberta-v2"), (1, "deberta-v2-unshared"), (2, "deberta-v2-unshared")]
)
def test_a_table_that_is_read_without_a_call_of_its_module_is_one_trajectory(row_index, family):
    """Positions that all layers read, normed and bare, in linears that run twice and in linears of their own."""
    setup = Setup(ROWS[row_index], stage=3, accumulation=2, teacher="teacher_zero3", family=family)
    results = run_world(_with_nothing_kept_whole, 2, setup)
    _assert_same(results[0], _reference(row_index, family), rtol=2e-5)
    assert results[0]["losses"][-1]["attentions"] > 0 or row_index != 2


@pytest.mark.parametrize(("selects", "teaches"), [(0, 1), (1, 0)], ids=["cofi with grain's", "grain with cofi's"])
def test_selection_and_distillation_combine_freely(selects, teaches):
    row = replace(ROWS[selects], distill=ROWS[teaches].distill, teacher_layers=ROWS[teaches].teacher_layers)
    reference = run_world(trajectory, 1, Setup(row))[0]
    results = run_world(trajectory, 2, Setup(row, stage=3, accumulation=2))
    _assert_same(results[0], reference, rtol=2e-5)
    assert reference["losses"][-1]["layers"] > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_layers_that_do_not_teach_in_a_step_leave_their_projections_alone(stage):
    """ZeRO-3 would apply the last gradient once more to what a step does not reach; and moments go on everywhere.

    A gate closes a student layer's FFN in some of these steps, and its teacher layer has nobody to teach.
    """
    row = replace(ROWS[0], distill=ROWS[1].distill, teacher_layers=ROWS[1].teacher_layers)
    reference = run_world(trajectory, 1, Setup(row))[0]
    results = run_world(trajectory, 2, Setup(row, stage=stage, accumulation=2))
    _assert_same(results[0], reference, rtol=2e-5)


def test_blocks_follow_one_trajectory_too():
    reference = run_world(trajectory, 1, Setup(BLOCKS))[0]
    assert [losses["total"] for losses in reference["losses"]] == pytest.approx(GOLDEN["blocks"], rel=1e-4)
    for changes in ({"stage": 2}, {"stage": 3, "accumulation": 2}):
        results = run_world(trajectory, 2, Setup(BLOCKS).at(**changes))
        assert len({result["fingerprint"] for result in results}) == 1
        _assert_same(results[0], reference, rtol=2e-5)


def test_scores_read_off_sharded_weights_are_one_trajectory():
    options = {
        "units": "heads",
        "score": "magnitude_l1",
        "ranking": "together",
        "ffn_weight": 8.0,
        "start": 0.2,
        "end": 0.5,
    }
    row = replace(ROWS[1], options=options)
    reference = run_world(trajectory, 1, Setup(row))[0]
    results = run_world(trajectory, 2, Setup(row, stage=3, accumulation=2))
    assert len({result["fingerprint"] for result in results}) == 1
    _assert_same(results[0], reference, rtol=2e-5)
    assert 0 < reference["state"]["mask.ffn_dim"].mean() < 1


@pytest.mark.parametrize(("task", "family"), [("conll2003", "token"), ("squad", "span")])
def test_losses_over_tokens_do_not_depend_on_how_a_batch_is_cut(task, family):
    setup = Setup(ROWS[1], stage=2, accumulation=2, family=family, task=task)
    results = run_world(trajectory, 2, setup)
    reference = run_world(trajectory, 1, setup.at(stage=0, accumulation=1))[0]
    _assert_same(results[0], reference, rtol=2e-5)


@pytest.mark.parametrize("row_index", range(len(ROWS)), ids=[row.name for row in ROWS])
def test_the_method_learns(row_index):
    """The trajectories above could all agree on standing still."""
    reference = _reference(row_index, "bert")
    fresh = run_world(_initial_state, 1, Setup(ROWS[row_index]))[0]
    for name, value in reference["state"].items():
        assert not np.array_equal(value, fresh[name]), f"{name} never moved"


def _initial_state(setup):
    return {name: value.numpy() for name, value in state_of(build_trainer(setup).replica.method).items()}


def test_bf16_follows_fp32():
    reference = _reference(0, "bert")
    results = run_world(trajectory, 2, Setup(ROWS[0], stage=2, precision="bf16"))
    assert len({result["fingerprint"] for result in results}) == 1
    for ours, theirs in zip(results[0]["losses"], reference["losses"], strict=True):
        assert ours["total"] == pytest.approx(theirs["total"], rel=0.05)


@pytest.mark.parametrize(
    ("row_index", "world_size", "changes"),
    [
        (0, 2, {"stage": 2}),
        (1, 2, {"stage": 3, "teacher": "teacher_zero3", "accumulation": 2}),
        (2, 1, {"stage": 0}),
        (1, 1, {"stage": 1, "activation_checkpointing": True}),
    ],
    ids=["cofi, zero2 x2", "grain, zero3 x2, sharded teacher", "mlpruning, zero0 x1", "grain, zero1 x1, checkpointing"],
)
def test_autocast_follows_fp32(row_index, world_size, changes):
    """The probe pass, which does not go through the engine, included; every loss within bf16's reach."""
    reference = _reference(row_index, "bert")
    results = run_world(under_autocast, world_size, trajectory, Setup(ROWS[row_index]).at(**changes))
    assert len({result["fingerprint"] for result in results}) == 1
    for ours, theirs in zip(results[0]["losses"], reference["losses"], strict=True):
        assert ours["total"] == pytest.approx(theirs["total"], rel=0.05)
        assert ours["total"] != theirs["total"], "nothing was cast"


def _diverge(setup):
    import torch

    from dsprune.errors import NumericsError

    trainer = build_trainer(setup)
    trainer.step(0)
    if trainer.world.rank == 1:
        with torch.no_grad():
            trainer.replica.method.parameters()["log_alpha.head"][0, 0] += 1e-6
    with pytest.raises(NumericsError) as caught:
        trainer.replica.check_equal(trainer.world, 1)
    return str(caught.value)


def test_replicas_that_drift_apart_stop_the_run():
    messages = run_world(_diverge, 2, Setup(ROWS[0], stage=2))
    assert messages == ["step 1: gates and multipliers on rank 1 differ from rank 0's"] * 2


def _poison(setup):
    from dsprune.errors import NumericsError

    trainer = build_trainer(setup)
    trainer.step(0)
    before = trainer.replica.fingerprint()
    teach = trainer.teacher.teach
    if trainer.world.rank == 1:
        trainer.teacher.teach = spoiled(teach, float("nan"))
    with pytest.raises(NumericsError, match=r"step 1: not finite on rank 1: losses, gate\.head"):
        trainer.step(1)
    return before == trainer.replica.fingerprint()


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_anything_is_applied():
    assert run_world(_poison, 2, Setup(ROWS[0], stage=2)) == [True, True]
