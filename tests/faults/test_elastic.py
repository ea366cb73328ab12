"""Faults 17, 18: a run goes on with other ranks, another ZeRO stage, another way of cutting a batch."""

from functools import cache

import pytest
import torch

from dsprune.consolidate import open_checkpoint, open_moments
from dsprune.methods import state_of
from tests.helpers.runs import checkpoints, execute, history, words
from tests.helpers.settings import ROWS, TRAINED
from tests.helpers.training import Setup, build_trainer
from tests.helpers.world import run_to_the_end, run_world

pytestmark = pytest.mark.dist
STEPS, CUT = 6, 3


def _first_half(setup, folder):
    from dsprune.engine.checkpoints.store import CheckpointStore, Snapshot

    trainer = build_trainer(setup)
    losses = [trainer.step(step).losses["total"] for step in range(CUT)]
    tensors = {} if trainer.matcher.distances is None else {"distances": trainer.matcher.distances}
    store = CheckpointStore(folder, "prune", trainer.world, keep=2, method=setup.row.name)
    store.save(trainer.engine, Snapshot(CUT, {}, tensors, None, lambda path: None, {}), trainer.replica)
    return losses


def _second_half(setup, folder, elastic):
    from dsprune.engine.checkpoints import resume
    from dsprune.engine.checkpoints.store import CheckpointStore

    trainer = build_trainer(setup)
    store = CheckpointStore(folder, "prune", trainer.world, keep=2, method=setup.row.name)
    said = []
    if elastic == "forced":
        resume._shape, resume.engine_precision = (lambda *shape: str(shape)), lambda engine: "another"
    newest = resume.find_newest(store, "must", said.append)
    restored = resume.restore(newest, store, trainer.engine, trainer.replica, reshard=True, say=said.append)
    trainer.matcher.distances = restored.tensors.get("distances")
    assert bool(said) == bool(elastic)
    losses = [trainer.step(step).losses["total"] for step in range(CUT, STEPS)]
    state = {name: value.numpy() for name, value in state_of(trainer.replica.method).items()}
    return losses, state, trainer.engine.global_steps


@cache
def _reference(row, precision=""):
    setup = Setup(ROWS[row], stage=2 if precision else 0, precision=precision)
    return run_world(_whole, 1, setup)[0]


def _whole(setup):
    trainer = build_trainer(setup)
    return [trainer.step(step).losses["total"] for step in range(STEPS)]


WAYS = [  # world and stage that saved -> world and stage that goes on
    (2, 2, 1, 2),
    (1, 3, 2, 3),
    (2, 3, 2, 1),
    (1, 0, 2, 3),
    *((world, stage, other, stage) for world, other in ((2, 1), (1, 2)) for stage in (0, 1, 2, 3)),
    *((2, stage, 2, other) for stage in range(4) for other in range(4) if stage != other),
    (2, 3, 1, 0),
    (2, 1, 1, 3),
]
WAYS = list(dict.fromkeys(WAYS))
QUICK = WAYS[:4]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id="{}xzero{}-{}xzero{}".format(*way), marks=() if way in QUICK else pytest.mark.faults)
        for way in WAYS
    ],
)
def test_f17_f18_other_world_or_stage(tmp_path, way):
    world, stage, other_world, other_stage = way
    row = WAYS.index(way) % len(TRAINED)  # of the others no shard holds anything
    setup = Setup(ROWS[row])
    before = run_world(_first_half, world, setup.at(stage=stage), tmp_path)[0]
    # Stage 0 saves whole tensors whatever the world, so that nothing has to be converted for another.
    after, _, counted = run_world(_second_half, other_world, setup.at(stage=other_stage), tmp_path, True)[0]
    assert counted == STEPS
    assert before + after == pytest.approx(_reference(row), rel=1e-5)


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=pytest.mark.faults)])
@pytest.mark.parametrize("into", [True, pytest.param(False, marks=pytest.mark.faults)], ids=["into", "out of"])
def test_f17_partitions_in_another_order(tmp_path, stage, into):
    """Parameters dealt out to the ranks in turn, and aligned: DeepSpeed's own addresses of them are wrong there."""
    shuffled = {"zero_optimization": {"stage": stage, "round_robin_gradients": True, "parameter_alignment": True}}
    first, then = Setup(ROWS[1], stage=3), Setup(ROWS[1], stage=stage, ds=shuffled)
    first, then = (first, then) if into else (then, first)
    before = run_world(_first_half, 2, first, tmp_path)[0]
    after, *_ = run_world(_second_half, 2, then, tmp_path, True)[0]
    assert before + after == pytest.approx(_reference(1), rel=1e-5)


@pytest.mark.parametrize("stage", [2, *(pytest.param(s, marks=pytest.mark.faults) for s in (0, 1, 3))])
def test_f17_conversion_changes_no_bit(tmp_path, stage):
    """The same shape through the converter and through DeepSpeed's own loader: equal losses, equal gates."""
    setup = Setup(ROWS[0], stage=stage)
    run_world(_first_half, 2, setup, tmp_path)
    plain, converted = (run_world(_second_half, 2, setup, tmp_path, elastic)[0] for elastic in (False, "forced"))
    assert plain[0] == converted[0]
    assert all((plain[1][name] == converted[1][name]).all() for name in plain[1])


@pytest.mark.faults
@pytest.mark.parametrize("way", [(2, 2, 1, 3), (2, 3, 1, 2), (1, 2, 2, 2)])
def test_f18_bf16_keeps_its_masters(tmp_path, way):
    world, stage, other_world, other_stage = way
    setup = Setup(ROWS[0], precision="bf16")
    before = run_world(_first_half, world, setup.at(stage=stage), tmp_path)[0]
    after, *_ = run_world(_second_half, other_world, setup.at(stage=other_stage), tmp_path, True)[0]
    assert before + after == pytest.approx(_reference(0, "bf16"), rel=0.05)


@pytest.mark.faults
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_f18_accumulation_changes_with_the_world(tmp_path, stage):
    setup = Setup(ROWS[0], stage=stage)
    before = run_world(_first_half, 2, setup.at(accumulation=1), tmp_path)[0]
    after, *_ = run_world(_second_half, 1, setup.at(accumulation=4), tmp_path, stage > 0 or True)[0]
    assert before + after == pytest.approx(_reference(0), rel=1e-5)


def _live(setup, folder):
    """Every rank's own values of the moments: by parameter, moment, and where in the parameter they begin."""
    trainer = build_trainer(setup)
    for step in range(CUT):
        trainer.step(step)
    trainer.engine.save_checkpoint(str(folder), tag="student", save_latest=False)
    optimizer, rank, held = trainer.engine.optimizer, trainer.world.rank, {}
    groups = (
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        if setup.stage == 3
        else zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
    )
    names = {param: name for name, param in trainer.engine.module.named_parameters()}
    for params, flat in groups:
        offset = 0
        for param in params:
            if setup.stage == 3:
                numel = param.ds_tensor.ds_numel
                start, at = rank * numel, offset
                offset += numel
            elif param._hp_mapping is None:
                continue
            else:
                place, own = param._hp_mapping.lp_fragment_address, param._hp_mapping.get_hp_fragment_address()
                start, at, numel = place.start, own.start, place.numel
            for key in ("exp_avg", "exp_avg_sq"):
                values = optimizer.optimizer.state[flat][key][at : at + numel]
                held[names[param], key, start] = values.numpy().copy()
    return held


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.faults), 2, 3])
def test_f17_moments_are_read_as_they_live(tmp_path, stage):
    live = run_world(_live, 2, Setup(ROWS[1], stage=stage), tmp_path)
    moments, steps = open_moments(tmp_path / "student")
    assert steps == CUT
    assert {name for held in live for name, _, _ in held} == set(moments["exp_avg"].names())
    for held in live:
        for (name, key, start), values in held.items():
            read = moments[key].read_flat(name, start, len(values))
            assert torch.equal(read, torch.from_numpy(values)), (name, key)


def _stopped_after(step, *words):
    from dsprune.engine.learning.trainer import Trainer

    real = Trainer.step

    def step_or_leave(self, number):
        if number == step:
            raise KeyboardInterrupt
        return real(self, number)

    Trainer.step = step_or_leave
    return execute(*words)


def test_f17_a_whole_run_goes_on_with_one_rank(place, undisturbed, tmp_path):
    """The same examples in the same order; dropout masks are drawn by rank, so losses come near, no more."""
    run = tmp_path / "run"
    assert run_world(_stopped_after, 2, 5, *words(place, run, student="zero3")) == [130, 130]
    ending = run_to_the_end(execute, 1, *words(place, run, student="zero2"))
    assert ending.codes == [0], ending.log
    assert "converting" in ending.log
    assert "saved by 2 rank(s) at ZeRO stage 3 in fp32, going on with 1 rank(s) at ZeRO stage 2" in ending.log
    assert checkpoints(run) == ["step-00000004", "step-00000006"]
    ours, theirs = ([line["loss/total"] for line in history(r) if "loss/total" in line] for r in (run, undisturbed()))
    assert len(ours) == len(theirs) == STEPS
    assert ours[:4] == pytest.approx(theirs[:4], rel=1e-4)
    assert ours[4:] == pytest.approx(theirs[4:], rel=0.1)
    open_checkpoint(run / "prune" / "checkpoints" / "step-00000006")


def test_f17_refused_where_it_is_not_wanted(place, tmp_path):
    run = tmp_path / "run"
    assert run_world(_stopped_after, 2, 5, *words(place, run)) == [130, 130]
    ending = run_to_the_end(execute, 1, *words(place, run), "checkpoint.reshard=false")
    assert ending.codes == [74]
    assert "was saved by 2 rank(s) at ZeRO stage 2 in fp32, this launch has 1 rank(s)" in ending.log


def test_f18_another_precision_is_a_difference(place, tmp_path):
    run = tmp_path / "run"
    assert run_world(_stopped_after, 2, 5, *words(place, run)) == [130, 130]
    launch = words(place, run, student="zero3_bf16")
    ending = run_to_the_end(execute, 2, *launch)
    assert ending.codes == [64, 64]
    assert "precision was 'fp32'" in ending.log
    assert run_world(execute, 2, *launch, 'checkpoint.allow_drift=["precision"]') == [0, 0]
