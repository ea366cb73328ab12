"""A given teacher is scored once, before anybody learns from it; one that is worse than chance teaches nobody."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

from tests.helpers.runs import execute, ground, history, words
from tests.helpers.world import run_to_the_end, run_world

pytestmark = pytest.mark.dist
SAYINGS = ("ann is older than ben.", "ben is older than ann.")


def _rows(count):
    return [(SAYINGS[i % 2], i % 2) for i in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A task that a tiny model learns in a moment, and a teacher that has learnt it."""
    folder = ground(tmp_path_factory.mktemp("given"))
    (folder / "data").mkdir()
    for split, count in (("train", 64), ("validation", 40)):
        rows = [f"{text},{label}" for text, label in _rows(count)]
        (folder / "data" / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]))
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    labels = {0: "negative", 1: "positive"}
    config = AutoConfig.from_pretrained(
        folder / "dense", id2label=labels, label2id={name: i for i, name in labels.items()}
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs = tokenizer(list(SAYINGS), return_tensors="pt")
    for _ in range(60):
        loss = model(**inputs, labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "teacher")
    return folder


def _launch(place, run, *overrides):
    return (*words(place, run), "task.name=sst2", f"data.path={place / 'data'}", *overrides)


def test_a_given_teacher_is_scored_once(place, tmp_path):
    run = tmp_path / "run"
    ending = run_to_the_end(execute, 2, *_launch(place, run))
    assert ending.codes == [0, 0], ending.log
    assert "teacher: given, accuracy 1.0000" in ending.log
    scored = [line for line in history(run) if line["stage"] == "teacher"]
    assert scored == [{"stage": "teacher", "step": 0, "eval/accuracy": 1.0}]
    facts = json.loads((run / "teacher" / "given.json").read_text())
    assert (facts["path"], facts["metrics"]) == (str(place / "teacher"), {"accuracy": 1.0})
    (run / "prune" / "done.json").unlink()
    again = run_to_the_end(execute, 2, *_launch(place, run))
    assert again.codes == [0, 0], again.log
    assert "teacher: given" not in again.log
    assert [line for line in history(run) if line["stage"] == "teacher"] == scored


def test_a_teacher_whose_head_is_in_another_order_stops_the_run(place, tmp_path):
    """Its names are the task's, in the task's order; the rows of its head are not."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in (place / "teacher").iterdir():
        (teacher / path.name).write_bytes(path.read_bytes())
    weights = load_file(teacher / "model.safetensors")
    swapped = {name: value.flip(0).clone() if "classifier" in name else value for name, value in weights.items()}
    save_file(swapped, teacher / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    ending = run_to_the_end(execute, 2, *_launch(place, run, f"teacher.path={teacher}"))
    assert ending.codes == [65, 65], ending.log
    (line,) = (line for line in ending.log.splitlines() if line.startswith("error: "))
    assert "does worse than chance on validation: 0.0% of its answers are right, and 100.0% with its labels" in line
    assert "positive -> negative, negative -> positive" in line
    assert not list(run.glob("prune/checkpoints/*"))


def test_a_teacher_that_knows_nothing_is_told(place, tmp_path):
    """Two sentences, one answer: no worse than chance, and no better."""
    other = ground(tmp_path)
    config = json.loads((place / "teacher" / "config.json").read_text())
    (other / "teacher" / "config.json").write_text(json.dumps(config))
    ending = run_to_the_end(execute, 1, *_launch(place, tmp_path / "run", f"teacher.path={other / 'teacher'}"))
    assert ending.codes == [0], ending.log
    assert "knows no more of validation than one answer for all: 50.0% of its answers are right" in ending.log


@pytest.mark.slow
def test_the_report_has_what_the_teacher_scored_before(place, tmp_path):
    run = tmp_path / "run"
    stages = 'stages=["prune", "consolidate", "evaluate"]'
    assert run_world(execute, 2, *_launch(place, run, stages)) == [0, 0]
    given = json.loads((run / "report.json").read_text())["given_teacher"]
    assert given == {"path": str(place / "teacher"), "metrics": {"accuracy": 1.0}}
