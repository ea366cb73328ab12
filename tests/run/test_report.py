"""The closing report where the teacher is not the model that is pruned: two models, each with its own figures."""

import json
import re
import shutil

import pytest
from transformers import BertConfig, BertForSequenceClassification

from dsprune.config import TaskConfig
from dsprune.consolidate import load_compact
from dsprune.measure.comparison import read_point
from dsprune.measure.summary import render_report
from dsprune.run.launch import plan_text
from dsprune.run.reporting.scorecard import evaluate_folder
from dsprune.tasks.benchmarks.order import LABELS
from dsprune.tasks.sources.readers import EvalData
from tests.helpers.folders import tiny_recipe
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe, and beside its model a teacher that is half as wide again."""
    folder = tmp_path_factory.mktemp("report")
    tiny_recipe(folder)
    shutil.copytree(folder / "dense", folder / "teacher")
    base = BertConfig.from_pretrained(folder / "dense")
    sizes = {"hidden_size": 48, "intermediate_size": 256, "vocab_size": base.vocab_size}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **labels)
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    return folder


def _count(folder, cls=BertForSequenceClassification):
    model = cls.from_pretrained(folder)
    return {
        "encoder": sum(p.numel() for p in model.bert.encoder.parameters()),
        "total": sum(p.numel() for p in model.parameters()),
    }


def _execute(*words):
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    return guarded(lambda: execute(words[0], words[1:]))


def test_teacher_and_base_are_counted_and_timed_apart(place):
    words = (str(place / "tiny.toml"), f"teacher.path={place / 'teacher'}", "log.tensorboard=false")
    stages = 'stages=["prune", "consolidate", "evaluate"]'
    assert run_world(_execute, 1, *words, stages) == [0]
    report = json.loads((place / "run" / "report.json").read_text())
    assert "dense" not in report
    teacher, base, compact = (report[kind] for kind in ("teacher", "base", "compact"))
    assert teacher["parameters"] == _count(place / "teacher")
    assert base["parameters"] == _count(place / "dense")
    assert compact["parameters"]["total"] == sum(p.numel() for p in load_compact(place / "run/compact").parameters())
    assert teacher["metrics"].keys() == compact["metrics"].keys()
    assert base["metrics"] == {}
    share = 1 - compact["parameters"]["encoder"] / base["parameters"]["encoder"]
    assert compact["sparsity"]["encoder"] == report["landing"]["measured"] == pytest.approx(share)
    assert report["bench"]["dense"]["parameters"] == teacher["parameters"]["total"]
    assert report["bench_base"]["dense"]["parameters"] == base["parameters"]["total"]
    assert compact["speedup"]["base"] == report["bench_base"]["rows"][0]["speedup"]
    assert compact["speedup"]["teacher"] == teacher["latency_ms"] / compact["latency_ms"]
    point = read_point(place / "run")
    assert point.speedup == compact["speedup"]["base"]
    assert point.dense == teacher["metrics"]["accuracy"]
    text = render_report(report, "run", "run/compact")
    assert re.search(r"over the teacher +over the base$", text.splitlines()[1])
    assert f"teacher: {place / 'teacher'}" in text
    assert f"base: {place / 'dense'}" in text


@pytest.mark.parametrize("kind", ["teacher", "compact"])
def test_the_command_finds_the_metrics_of_the_report(place, kind):
    """One process and other batches: invariant 8 for what `dsprune evaluate` says."""
    report = json.loads((place / "run" / "report.json").read_text())
    data = EvalData(max_train_examples=64, max_eval_examples=20)
    card = evaluate_folder(report[kind]["source"], TaskConfig(name="order", max_length=32), data, batch_size=3)
    assert card.splits["validation"].metrics == report[kind]["metrics"]
    assert card.parameters == report[kind]["parameters"]
    assert card.sparsity == report[kind].get("sparsity", {})


def test_a_dry_run_sizes_the_teacher_by_its_own_configuration(place):
    recipe = str(place / "tiny.toml")
    given = plan_text(recipe, [f"teacher.path={place / 'teacher'}"])
    sizes = re.search(r"^student +([\d,]+).*\nteacher +([\d,]+)", given, re.MULTILINE).groups()
    assert [int(size.replace(",", "")) for size in sizes] == [
        _count(place / "dense")["total"],
        _count(place / "teacher")["total"],
    ]
    assert f"teacher: {place / 'teacher'}" in given
    own = re.search(r"^teacher +([\d,]+)", plan_text(recipe, ["prune.embedding_rank=8"]), re.MULTILINE)
    # The student's word embedding is factored, the teacher's is not.
    assert int(own[1].replace(",", "")) == _count(place / "dense")["total"]
