"""Teachers of another depth, width or make: they teach, or are refused in one line before anything trains."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dsprune.config import load_config
from dsprune.consolidate import apply_selection
from dsprune.errors import ConfigError
from dsprune.methods import method_options
from dsprune.run.preflight import preflight
from dsprune.structure import Selection, analyze
from tests.helpers.folders import tiny_folder, tiny_recipe, tiny_tokenizer
from tests.helpers.runs import execute
from tests.helpers.selections import random_gates
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, trajectory
from tests.helpers.world import run_world

LABELS = {0: "contradicts", 1: "follows"}


def _teacher(folder, **sizes):
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
            "num_labels": 2,
            "id2label": LABELS,
            "label2id": {name: i for i, name in LABELS.items()},
            **sizes,
        }
    )
    torch.manual_seed(3)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student of two layers, 32 wide, and a teacher of four, 48 wide."""
    folder = tmp_path_factory.mktemp("teaching")
    tiny_folder(folder / "dense")
    _teacher(folder / "teacher")
    return folder


def _ready(place, *overrides, method="cofi"):
    recipe = tiny_recipe(place, method=method)
    overrides = (f"teacher.path={place / 'teacher'}", *overrides)
    return preflight(load_config(str(recipe), overrides, method_options=method_options), 1)


def test_depth_and_defaults_are_the_teachers(place):
    plan = _ready(place).teaching
    assert (plan.layers, plan.partners) == ((1, 2, 3, 4), (1, 1, 2, 2))
    assert _ready(place, "distill.teacher_layers=[3, 4]").teaching.layers == (3, 4)
    assert _ready(place, 'distill.match="fixed"').teaching.partners == (1, 2)
    pairs = _ready(place, 'distill.match="fixed"', "distill.layer_pairs=[[0, 0], [1, 3]]").teaching
    assert (pairs.layers, pairs.partners) == ((0, 3), (0, 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.teacher_layers=[1, 5]"], "name layers from 1 to 4"),
        (["distill.match=fixed", "distill.layer_pairs=[[3, 4]]"], "the student has 2 and the teacher 4"),
        (["distill.match=fixed", "distill.teacher_layers=[1, 2]"], "both stand beside layer 1"),
        (["distill.projection=none"], "the teacher is 48 wide and the student 32"),
        (["distill.teacher_layers=[1, 5]", "distill.projection=none"], "48 wide"),
    ],
)
def test_what_does_not_fit_is_told_before_training(place, overrides, message):
    with pytest.raises(ConfigError, match=message.replace("[", "\\[")):
        _ready(place, *overrides)


def test_all_that_does_not_fit_is_told_at_once(place):
    with pytest.raises(ConfigError) as caught:
        _ready(place, "distill.teacher_layers=[1, 5]", "distill.projection=none")
    assert len(caught.value.mistakes) == 2


def test_maps_of_unlike_heads_are_refused_and_of_like_ones_compared(place, tmp_path):
    assert _ready(place, "distill.attentions=0.5").teaching.layers == (1, 2, 3, 4)
    _teacher(tmp_path / "teacher", num_attention_heads=2)
    tiny_folder(tmp_path / "dense")
    with pytest.raises(ConfigError, match="the teacher's layers have 2 heads and the student's 4"):
        _ready(tmp_path, "distill.attentions=0.5")


def test_states_that_pruning_narrows_need_a_projection(place, tmp_path):
    _teacher(tmp_path / "teacher", hidden_size=32)
    tiny_folder(tmp_path / "dense")
    with pytest.raises(ConfigError, match="pruning removes hidden dimensions"):
        _ready(tmp_path, "distill.projection=none")
    _ready(tmp_path, "distill.projection=none", 'method.gates=["head", "ffn_dim"]')
    _ready(tmp_path, "distill.projection=none", 'recover.duration="0 steps"')


@pytest.mark.parametrize(
    ("sizes", "unlike"),
    [
        ({}, "num_hidden_layers 4, not 2; hidden_size 48, not 32; intermediate_size 32, not 64"),
        (
            {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 8},
            "num_attention_heads 8, not 4",
        ),
        (
            {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 80},
            "(80, 32)",
        ),
    ],
    ids=["other sizes", "other heads alone", "other positions alone"],
)
def test_a_student_cannot_start_as_another_model(place, tmp_path, sizes, unlike):
    _teacher(tmp_path / "teacher", **sizes)
    tiny_folder(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"prune\.start = 'teacher': the student is to be a copy") as caught:
        _ready(tmp_path, "prune.start=teacher")
    assert unlike in str(caught.value)
    _ready(tmp_path, "prune.start=pretrained")


def test_a_student_cannot_start_as_a_compact_model(tmp_path):
    dense = BertForSequenceClassification.from_pretrained(_teacher(tmp_path / "teacher", hidden_size=32))
    structure = analyze(dense)
    apply_selection(dense, Selection.from_gates(structure, random_gates(structure, 3))).save_pretrained(
        tmp_path / "teacher"
    )
    tiny_folder(tmp_path / "dense")
    with pytest.raises(ConfigError, match="it is pruned already"):
        _ready(tmp_path, "prune.start=teacher")


def test_a_student_starts_as_a_teacher_of_its_own_sizes(tmp_path):
    _teacher(tmp_path / "teacher", hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    tiny_folder(tmp_path / "dense")
    _ready(tmp_path, "prune.start=teacher", "prune.embedding_rank=8")


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_under_a_deeper_and_wider_teacher_ends_with_a_recovered_model(place):
    recipe = tiny_recipe(place, output=place / "run")
    overrides = (f"teacher.path={place / 'teacher'}", "log.tensorboard=false", "deepspeed.student=zero2")
    stages = 'stages=["prune", "consolidate", "recover"]'
    assert run_world(execute, 1, str(recipe), stages, *overrides, "deepspeed.teacher=teacher") == [0]
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    learned = {line["stage"] for line in lines if line.get("loss/layers", 0) > 0}
    assert learned == {"prune", "recover"}
    assert (place / "run" / "recovered" / "config.json").exists()


DEEP = {"teacher_model": "bert-deep"}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("index", "distill", "layers"),
    [
        pytest.param(0, {"match": "monotone"}, None, marks=pytest.mark.slow),
        (1, {"match": "fixed", "projection": "separate", "layer_pairs": ((0, 0), (1, 3), (2, 4))}, None),
        (0, {"match": "free", "teacher_draw": "quarters", "projection_rate": "constant"}, None),
    ],
    ids=["default layers", "pairs", "drawn layers"],
)
def test_every_way_of_running_is_one_trajectory_under_a_deeper_and_wider_teacher(index, distill, layers):
    from dataclasses import replace

    row = replace(ROWS[index], distill=distill, teacher_layers=layers)
    reference = run_world(trajectory, 1, Setup(row, **DEEP))[0]
    results = run_world(trajectory, 2, Setup(row, stage=3, accumulation=2, teacher="teacher_zero3", **DEEP))
    assert len({result["fingerprint"] for result in results}) == 1
    # In a step whose drawn layers have lost their FFN, nobody learns from them.
    assert sum(losses["layers"] > 0 for losses in reference["losses"]) > len(reference["losses"]) / 2
    for ours, theirs in zip(results[0]["losses"], reference["losses"], strict=True):
        assert ours == {part: pytest.approx(value, rel=2e-5, abs=1e-6) for part, value in theirs.items()}
