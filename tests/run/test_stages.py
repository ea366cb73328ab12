"""Whole runs in forked worlds: every stage, finished once, resumed exactly, exported and reported."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import dsprune.methods
from dsprune.config import DataConfig, TaskConfig
from dsprune.consolidate import load_compact
from dsprune.tasks import build_task
from tests.helpers.exported import measure, predict
from tests.helpers.folders import (
    METHODS,
    SIDE_FILES,
    encoder_decoder_recipe,
    fine_tuned_folder,
    sentencepiece_folder,
    tiny_recipe,
)
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


def _execute(recipe, *overrides):
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    return guarded(lambda: execute(str(recipe), overrides))


@pytest.fixture(scope="module")
def finish(tmp_path_factory):
    """Folder of a finished run of a method; run once."""

    @cache
    def run(method):
        folder = tmp_path_factory.mktemp(method)
        if method == "cofi":  # on a model that knows the task, its labels in another order
            fine_tuned_folder(folder / "dense", ["Follows", "CONTRADICTS"])
        assert run_world(_execute, 2, tiny_recipe(folder, method=method)) == [0, 0]
        return folder

    return run


@pytest.fixture
def finished(finish):
    return finish("cofi")


# GRAIN has no stage of its own: its whole launch is a slow test, its parts are in the others. So is that of a method
# which trains nothing (`test_untrained.py`).
SLOW = ("grain", "fisher")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS])
def finished_by(finish, request):
    return finish(request.param)


def _metrics(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ranks"), [("cofi", 2), ("grain", 1)])
def test_a_model_with_sentencepiece_and_relative_positions_goes_all_the_way(method, ranks, tmp_path):
    sentencepiece_folder(tmp_path / "dense")
    assert run_world(_execute, ranks, tiny_recipe(tmp_path, method=method)) == [0] * ranks
    run = tmp_path / "run"
    assert json.loads((run / "report.json").read_text())["landing"]["measured"] >= 0.5 - 1e-9
    assert type(load_compact(run / "recovered")).__name__ == "CompactDebertaV2ForSequenceClassification"
    ids = AutoTokenizer.from_pretrained(run / "recovered")("Ben is older.")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "dense")("Ben is older.")["input_ids"]
    assert len(ids) > 4
    assert (run / "recovered" / "spm.model").read_bytes() == (tmp_path / "dense" / "spm.model").read_bytes()


def test_there_is_a_tiny_recipe_for_every_method():
    assert set(METHODS) == set(dsprune.methods.METHODS)


def test_one_launch_does_everything(finished_by):
    run = finished_by / "run"
    for stage in ("teacher", "prune", "consolidate", "recover", "evaluate"):
        assert (run / stage / "done.json").exists(), stage
    report = json.loads((run / "report.json").read_text())
    blocks = report["blocks"] is not None
    assert blocks is (finished_by.name.startswith("mlpruning"))
    compact = load_compact(run / ("sparse" if blocks else "recovered"))
    assert report["compact"]["parameters"]["total"] == sum(p.numel() for p in compact.parameters())
    assert report["dense"]["metrics"].keys() == report["compact"]["metrics"].keys()
    assert report["landing"]["measured"] >= report["landing"]["target"] - 1e-9
    if blocks:
        assert report["blocks"]["measured"] >= report["blocks"]["target"]
        left = (1 - report["landing"]["measured"]) * (1 - report["blocks"]["measured"])
        assert report["blocks"]["together"] == pytest.approx(1 - left)
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())


MODELS = ("teacher/model", "compact", "recovered")
"""Folders that a run leaves."""


def test_the_metric_is_that_of_the_exported_folder(finished, tmp_path):
    """Invariant 8: in the run, in the report, and in plain transformers by `id2label`, on labels in another order."""
    run = finished / "run"
    task = build_task(TaskConfig(name="order"), DataConfig(max_train_examples=64, max_eval_examples=20), seed=42)
    columns = task.read(False).evals["validation"].columns
    truth = [task.labels[label] for label in columns["label"]]
    texts = list(zip(columns["premise"], columns["hypothesis"], strict=True))
    said = predict([run / name for name in MODELS], texts, task.head, tmp_path)
    report = json.loads((run / "report.json").read_text())
    done = {stage: json.loads((run / stage / "done.json").read_text()) for stage in ("teacher", "prune", "recover")}
    theirs = {name: measure("accuracy", truth, said[run / name]) for name in MODELS}
    assert theirs["teacher/model"] != 0.5, "which would be right in any order"
    assert theirs["teacher/model"] == done["teacher"]["metrics"]["accuracy"] == report["dense"]["metrics"]["accuracy"]
    assert theirs["recovered"] == done["recover"]["metrics"]["accuracy"] == report["compact"]["metrics"]["accuracy"]
    for name in MODELS:
        config = json.loads((run / name / "config.json").read_text())
        assert config["id2label"] == {"0": "contradicts", "1": "follows"}, name
        assert config["label2id"] == {"contradicts": 0, "follows": 1}, name


def test_what_lies_beside_a_model_is_in_every_folder(finished):
    for name in MODELS:
        folder = finished / "run" / name
        for file, content in SIDE_FILES.items():
            assert (folder / file).read_text() == content, (name, file)
        assert not list(folder.glob("pytorch_model*"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


def test_checkpoints_hold_neither_weights_nor_code_beside_the_shards(finished):
    for stage in ("teacher", "prune", "recover"):
        for model in (finished / "run" / stage / "checkpoints").glob("*/model"):
            files = {path.name for path in model.rglob("*") if path.is_file()}
            assert not [name for name in files if name.endswith((".safetensors", ".bin", ".py"))], model


def test_metrics_say_what_happened(finished):
    lines = _metrics(finished / "run")
    pruning = [line for line in lines if line["stage"] == "prune" and "loss/total" in line]
    assert [line["step"] for line in pruning] == [1, 2, 3, 4, 5, 6]
    for key in ("loss/logits", "loss/layers", "tokens_per_second", "lr/weights", "lr/gates"):
        assert all(key in line for line in pruning), key
    for key in ("sparsity/expected", "sparsity/hard", "sparsity/target"):
        assert key in pruning[-1], key
    assert {line["stage"] for line in lines if "eval/accuracy" in line} == {"teacher", "prune", "recover"}


def test_a_finished_stage_is_not_redone(finished):
    before = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.safetensors")}
    assert run_world(_execute, 2, finished / "tiny.toml") == [0, 0]
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.safetensors")}


def test_a_finished_stage_with_other_settings_is_refused(finished):
    assert run_world(_execute, 2, finished / "tiny.toml", "prune.target=0.6") == [64, 64]


def _stop_after(recipe, stage, step, *overrides):
    """Run, but lose power after some steps of a stage."""
    from dsprune.engine.learning.trainer import Trainer

    real = Trainer.step

    def step_or_stop(self, number):
        if self.stage == stage and number == step:
            raise KeyboardInterrupt
        return real(self, number)

    Trainer.step = step_or_stop
    return _execute(recipe, *overrides)


@pytest.mark.parametrize(
    ("method", "student"),
    [
        ("cofi", "zero2"),
        ("grain", "zero3"),
        pytest.param("cofi", "zero1", marks=pytest.mark.slow),
        pytest.param("cofi", "zero3", marks=pytest.mark.slow),
        pytest.param("grain", "zero2", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(finished, tmp_path, method, student):
    """Invariant 6, bitwise, dropout on: stopped two steps after a checkpoint in the middle of pruning."""
    recipe = tiny_recipe(tmp_path, output=tmp_path / "unused", method=method)
    teacher = f"teacher.path={finished / 'run' / 'teacher' / 'model'}"
    common = (teacher, f"deepspeed.student={student}", 'stages=["prune"]', "log.tensorboard=false")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_world(_execute, 2, recipe, *common, f"output={whole}") == [0, 0]
    _stop_and_go_on(recipe, whole, stopped, *common)


def test_a_resumed_encoder_decoder_meets_the_same_noise(tmp_path):
    """Invariant 6 for span corruption, over several epochs, each with noise of its own."""
    recipe = encoder_decoder_recipe(tmp_path, task="span_corruption", dropout_rate=0.1)
    common = (
        "data.max_train_examples=80",
        "deepspeed.student=zero2",
        "log.tensorboard=false",
        "checkpoint.every=4 steps",
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_world(_execute, 2, recipe, *common, 'stages=["teacher", "prune"]', f"output={whole}") == [0, 0]
    again = ('stages=["prune"]', f"teacher.path={whole / 'teacher' / 'model'}")
    _stop_and_go_on(recipe, whole, stopped, *common, *again)


def _stop_and_go_on(recipe, whole, stopped, *common):
    """See that a run which is stopped and resumed is the whole one, bit by bit."""
    assert run_world(_stop_after, 2, recipe, "prune", 5, *common, f"output={stopped}") == [130, 130]
    assert not (stopped / "prune" / "done.json").exists()
    assert run_world(_execute, 2, recipe, *common, f"output={stopped}") == [0, 0]
    last = Path("prune") / "checkpoints" / "step-00000006"
    ours, theirs = (load_file(run / last / "replica.safetensors") for run in (whole, stopped))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [
        [line["loss/total"] for line in _metrics(run) if "loss/total" in line and line["stage"] == "prune"]
        for run in (whole, stopped)
    ]
    assert losses[0] == losses[1]
    from dsprune.consolidate import open_checkpoint

    weights = [open_checkpoint(run / last) for run in (whole, stopped)]
    for name in weights[0].names():
        assert torch.equal(weights[0].read(name), weights[1].read(name)), name


@pytest.mark.slow
def test_pruning_blocks_resumes_bitwise(finish, tmp_path):
    """From the compact model of a finished run, stopped between two checkpoints of the blocks stage."""
    runs = {}
    for name in ("whole", "stopped"):
        source = finish("mlpruning") / "run"
        runs[name] = shutil.copytree(
            source, tmp_path / name, ignore=shutil.ignore_patterns("blocks", "sparse", "evaluate")
        )
    recipe = tiny_recipe(tmp_path, output=tmp_path / "unused", method="mlpruning")
    common = (
        'stages=["blocks"]',
        "log.tensorboard=false",
        "checkpoint.every=2 steps",
        f"model.name={finish('mlpruning') / 'dense'}",
    )
    assert run_world(_execute, 2, recipe, *common, f"output={runs['whole']}") == [0, 0]
    assert run_world(_stop_after, 2, recipe, "blocks", 3, *common, f"output={runs['stopped']}") == [130, 130]
    assert run_world(_execute, 2, recipe, *common, f"output={runs['stopped']}") == [0, 0]
    ours, theirs = (load_file(run / "sparse" / "model.safetensors") for run in runs.values())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_blocks_need_a_compact_model(tmp_path):
    recipe = tiny_recipe(tmp_path, method="mlpruning")
    assert run_world(_execute, 1, recipe, 'stages=["blocks"]') == [64]


def test_the_selection_survives_recovery(finished_by):
    """Gates are fixed after pruning: recovery changes weights, not shapes."""
    run = finished_by / "run"
    compact, recovered = (load_file(run / name / "model.safetensors") for name in ("compact", "recovered"))
    assert {k: v.shape for k, v in compact.items()} == {k: v.shape for k, v in recovered.items()}
    assert any(not torch.equal(compact[name], recovered[name]) for name in compact)
