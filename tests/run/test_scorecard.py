"""`dsprune evaluate`: the metric of plain transformers, for every kind of folder, and files for leaderboards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from dsprune.cli import main
from dsprune.config import TaskConfig
from dsprune.consolidate import apply_selection
from dsprune.run.reporting.scorecard import evaluate_folder
from dsprune.structure import CostModel, Selection, analyze
from dsprune.tasks.benchmarks.glue import GLUE
from dsprune.tasks.benchmarks.order import generate
from dsprune.tasks.kinds.tokens import entity_scores
from dsprune.tasks.sources.readers import EvalData
from tests.helpers.folders import tiny_tokenizer
from tests.helpers.selections import random_gates

ROOT = Path(__file__).parents[2]
NUM = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models with some answer to sentences and to pairs of them, dense and compact, and data without training files."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    for task in ("sst2", "mnli", "stsb"):
        _model(task).save_pretrained(folder / task)
        tiny_tokenizer().save_pretrained(folder / task)
    dense = BertForSequenceClassification.from_pretrained(folder / "sst2").eval()
    structure = analyze(dense)
    selection = Selection.from_gates(structure, random_gates(structure, 3))
    apply_selection(dense, selection).save_pretrained(folder / "compact")
    tiny_tokenizer().save_pretrained(folder / "compact")
    BertModel(_model("sst2").config).save_pretrained(folder / "encoder")
    (folder / "run" / "recovered").mkdir(parents=True)
    for name in ("status.json", "config.json", "recovered/config.json"):
        (folder / "run" / name).write_text("{}")
    (folder / "data").mkdir()
    examples = generate(5, num_train=4, num_validation=NUM)[1]
    rows = [{"sentence": e.premise, "label": i % 2} for i, e in enumerate(examples)]
    _write(folder / "data" / "validation.jsonl", rows)
    _write(folder / "data" / "test.jsonl", [{**row, "label": -1} for row in rows])
    return folder


def _model(task):
    names = GLUE[task].labels or ("score",)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = BertForSequenceClassification(config).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    texts = zip(*((e.premise, e.hypothesis) for e in generate(9, num_train=4, num_validation=12)[1]), strict=True)
    with torch.no_grad():
        # So that no class is always the answer.
        known = model(**tiny_tokenizer()(*map(list, texts), padding=True, return_tensors="pt")).logits
        model.classifier.bias -= known.mean(0)
    return model


def _write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _answers(folder, texts, **options):
    """Logits by plain transformers, one example at a time."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*text, return_tensors="pt", **options)).logits for text in texts])


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_metric_is_that_of_plain_transformers(place, capsys):
    words = ["--task", "sst2", "--data", str(place / "data"), "--batch", "7", "--json", str(place / "found.json")]
    assert main(["evaluate", str(place / "sst2"), *words]) == 0
    found = json.loads((place / "found.json").read_text())
    rows = _rows(place / "data" / "validation.jsonl")
    predicted = _answers(place / "sst2", [(row["sentence"],) for row in rows]).argmax(-1).tolist()
    right = sum(row["label"] == label for row, label in zip(rows, predicted, strict=True))
    (score,) = found["splits"].values()
    assert score["metrics"] == {"accuracy": right / NUM}
    assert score["examples"] == NUM
    assert score["seconds_per_example"] > 0
    dense = BertForSequenceClassification.from_pretrained(place / "sst2")
    assert found["parameters"]["total"] == sum(p.numel() for p in dense.parameters())
    assert found["sparsity"] == {}
    text = capsys.readouterr().out
    assert f"{right / NUM:.4f}" in text
    assert "seconds an example" in text


def test_a_compact_folder_tells_its_sparsity(place):
    card = evaluate_folder(
        str(place / "compact"), TaskConfig(name="sst2"), EvalData(path=str(place / "data")), batch_size=8
    )
    dense = CostModel(analyze(BertForSequenceClassification.from_pretrained(place / "sst2"))).dense("encoder")
    assert card.model == "CompactBertForSequenceClassification"
    assert card.sparsity["encoder"] == 1 - card.parameters["encoder"] / dense > 0
    assert card.splits["validation"].metrics.keys() == {"accuracy"}


def test_predictions_for_examples_without_labels(place, tmp_path, capsys):
    words = ["--task", "sst2", "--data", str(place / "data"), "--split", "test"]
    assert main(["evaluate", str(place / "sst2"), *words, "--predictions", str(tmp_path / "glue")]) == 0
    assert "nothing is measured" in capsys.readouterr().out
    lines = (tmp_path / "glue" / "SST-2.tsv").read_text().splitlines()
    texts = [(row["sentence"],) for row in _rows(place / "data" / "test.jsonl")]
    expected = _answers(place / "sst2", texts).argmax(-1).tolist()
    assert lines == ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(expected))]
    # Without a place for predictions there is nothing to be done with such a split.
    assert main(["evaluate", str(place / "sst2"), *words]) == 65
    assert "-1" in capsys.readouterr().err


def test_named_classes_and_two_splits(place, tmp_path):
    """MNLI's files are two, and hold names; labels may be missing as a column."""
    pairs = [(e.premise, e.hypothesis) for e in generate(9, num_train=4, num_validation=12)[1]]
    for split in ("test_matched", "test_mismatched"):
        _write(tmp_path / f"{split}.jsonl", [dict(zip(("premise", "hypothesis"), pair, strict=True)) for pair in pairs])
    task, data = TaskConfig(name="mnli"), EvalData(path=str(tmp_path), split="test")
    card = evaluate_folder(str(place / "mnli"), task, data, predictions=tmp_path / "out")
    assert [Path(path).name for path in card.written] == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    names = BertConfig.from_pretrained(place / "mnli").id2label
    expected = [names[i] for i in _answers(place / "mnli", pairs).argmax(-1).tolist()]
    lines = (tmp_path / "out" / "MNLI-m.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == expected
    assert len(set(expected)) > 1


def test_a_regression_stays_within_its_bounds(place, tmp_path):
    pairs = [(e.premise, e.hypothesis) for e in generate(9, num_train=4, num_validation=12)[1]]
    _write(tmp_path / "test.jsonl", [{"sentence1": a, "sentence2": b, "label": -1.0} for a, b in pairs])
    task, data = TaskConfig(name="stsb"), EvalData(path=str(tmp_path), split="test")
    evaluate_folder(str(place / "stsb"), task, data, predictions=tmp_path / "mine.tsv")
    written = [float(line.split("\t")[1]) for line in (tmp_path / "mine.tsv").read_text().splitlines()[1:]]
    assert written == pytest.approx(_answers(place / "stsb", pairs).squeeze(-1).clamp(0, 5).tolist(), abs=6e-4)


def test_keys_of_a_recipe_and_one_split(place):
    data = EvalData(path=str(place / "data"), split="validation", max_eval_examples=4)
    card = evaluate_folder(str(place / "sst2"), TaskConfig(name="sst2"), data)
    assert card.splits["validation"].examples == 4
    assert any("first 4" in note for note in card.notes)


OWN = {
    "classes": (["bad", "ok", "good"], None, [0, "ok", "bad", "ok"]),  # none is good, one is the number of its name
    "several labels": (["new", "big", "red"], "multi_label_classification", [["red"], [], ["red", "new"], ["new"]]),
    "numbers": (["score"], "regression", [1, 2, 2, 5]),  # whole ones
    "tags": (["O", "I-PER", "B-PER", "B-LOC"], None, [["O", "B-PER"], ["B-PER", 1], [0, "O"], ["O", "O"]]),
}
"""Of a model: label names, kind; and labels of an evaluation split that tell neither."""
SAID = [["ann", "is"], ["ben", "ann"], ["is", "older"], ["than", "ben"]]


def _own_model(folder, names, kind, head):
    config = BertConfig.from_pretrained(
        folder / "sst2", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    config.problem_type = kind
    torch.manual_seed(2)
    model = head(config).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.5)
    return model


@pytest.mark.parametrize("kind", OWN)
def test_a_model_tells_the_labels_of_ones_own_data(place, tmp_path, kind):
    """What a split to evaluate on lacks, or calls by numbers, the model knows."""
    names, problem_type, labels = OWN[kind]
    tags = kind == "tags"
    model = _own_model(
        place, names, problem_type, BertForTokenClassification if tags else BertForSequenceClassification
    )
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    keys = ("tokens", "tags") if tags else ("text", "label")
    rows = [words if tags else " ".join(words) for words in SAID]
    _write(tmp_path / "validation.jsonl", [dict(zip(keys, row, strict=True)) for row in zip(rows, labels, strict=True)])
    settings = TaskConfig(name="token_classification" if tags else "text_classification")
    (score,) = evaluate_folder(str(tmp_path / "model"), settings, EvalData(path=str(tmp_path))).splits.values()
    with torch.no_grad():
        logits = model(**tiny_tokenizer()(rows, is_split_into_words=tags, return_tensors="pt")).logits
    if kind == "numbers":
        known = {"pearson": stats.pearsonr(labels, logits[:, 0]).statistic}
    elif kind == "several labels":
        known = {"micro_f1": f1_score([[n in row for n in names] for row in labels], logits > 0, average="micro")}
    elif kind == "classes":
        known = {
            "accuracy": sum(names[i] == row for i, row in zip(logits.argmax(-1), ["bad", *labels[1:]], strict=True)) / 4
        }
    else:
        said = [[names[i] for i in row] for row in logits[:, 1:-1].argmax(-1)]
        known = {"f1": entity_scores(said, [["O", "B-PER"], ["B-PER", "I-PER"], ["O", "O"], ["O", "O"]])["f1"]}
    assert {name: score.metrics[name] for name in known} == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize(
    ("folder", "words", "code", "message"),
    [
        ("sst2", ["--task", "sst3"], 64, "did you mean"),
        ("sst2", ["--task", "sst2", "prune.target=0.5"], 64, "unknown key 'prune'"),
        ("sst2", ["--task", "sst2", "task.max_lenght=9"], 64, "max_length"),
        ("sst2", ["--task", "sst2", "--max-length", "65"], 64, "64 positions"),
        ("sst2", ["--task", "sst2", "--split", "nowhere"], 65, "holds nowhere"),
        ("sst2", ["--task", "squad"], 65, "no trained head for task 'squad'"),
        ("sst2", ["--task", "mnli", "--split", "validation"], 65, "2 labels and task 'mnli' has 3"),
        ("sst2", ["--task", "conll2003", "--predictions", "x"], 64, "no file format"),
        ("encoder", ["--task", "sst2"], 65, "is BertModel, which has no trained head"),
        ("run", ["--task", "sst2"], 64, "is a run folder"),
        ("nowhere", ["--task", "sst2"], 64, "nowhere"),
    ],
)
def test_mistakes_are_one_line(place, folder, words, code, message, capsys):
    assert main(["evaluate", str(place / folder), "--data", str(place / "data"), *words]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_no_deepspeed_is_needed(place):
    """In a process of its own, where DeepSpeed cannot be imported."""
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from dsprune.cli import main\n"
        f"sys.exit(main(['evaluate', {str(place / 'compact')!r}, '--task', 'order', 'data.max_eval_examples=8']))"
    )
    _relabel(place / "compact")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def _relabel(folder):
    """The generated task's labels, in place of those of SST-2."""
    path = folder / "config.json"
    names = {"0": "contradicts", "1": "follows"}
    labels = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **labels}))
