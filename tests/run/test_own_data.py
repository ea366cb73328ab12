"""The tasks on any data from end to end: the metric of the run is that of the exported folder, read by label name."""

import json
import re
import tomllib

import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from dsprune.config import DataConfig, TaskConfig
from dsprune.tasks import build_task
from dsprune.tasks.kinds.tokens import entity_scores
from tests.helpers.folders import tiny_folder
from tests.helpers.own_data import KINDS, write_own_data
from tests.helpers.stranger import run_stranger
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist

STRANGER = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer
folders, rows = json.loads(sys.argv[1]), json.loads(open(sys.argv[2]).read())
answers = []
for folder in folders:
    words = isinstance(rows[0][0], list)
    auto = AutoModelForTokenClassification if words else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    names, kind, said = model.config.id2label, model.config.problem_type, []
    for texts in rows:
        with torch.no_grad():
            if words:
                batch = tokenizer(texts[0], is_split_into_words=True, return_tensors="pt")
                ids = batch.word_ids()
                classes = model(**batch).logits[0].argmax(-1).tolist()
                said.append([names[classes[ids.index(i)]] for i in range(len(texts[0]))])
                continue
            logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0]
        if kind == "regression":
            said.append(logits.item())
        elif kind == "multi_label_classification":
            said.append(sorted(names[i] for i in (logits > 0).nonzero().flatten().tolist()))
        else:
            said.append(names[logits.argmax().item()])
    names = [names[i] for i in sorted(names)]
    answers.append({"said": said, "names": names, "problem_type": kind, "class": type(model).__name__})
print(json.dumps(answers))
"""


def _execute(recipe, *overrides):
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    return guarded(lambda: execute(str(recipe), overrides))


def _examples(folder, recipe):
    """Texts and labels of the validation split and labels of the training split, as the task reads them."""
    table = tomllib.loads("\n".join(word for word in recipe[1:] if re.match(r"task\.(multi|label_sep)|data\.", word)))
    task = TaskConfig(name=recipe[0].split("_", 1)[1], **table.get("task", {}))
    task = build_task(task, DataConfig(path=str(folder), **table.get("data", {})), seed=0)
    splits = task.read(False)
    texts, label = (task.columns[:1], task.columns[1]) if task.problem == "tokens" else (task.columns, "label")
    split = splits.evals["validation"]
    rows = [list(row) for row in zip(*(split.columns[name] for name in texts), strict=True)]
    return rows, list(split.columns[label]), list(splits.train.columns[label])


def _labels(true):
    """All labels that occur in some labels, joined, in lists or alone."""
    return {name for row in true for name in (row if isinstance(row, list) else row.split("|")) if name}


def _scores(kind, said, true, names):
    if kind in ("classes", "pairs"):
        scores = {"accuracy": accuracy_score(true, said), "macro_f1": f1_score(true, said, average="macro")}
        return scores | ({"f1": f1_score(true, said, pos_label=names[1])} if len(names) == 2 else {})
    if kind == "several labels":
        table = [[[name in row for name in names] for row in rows] for rows in ([t.split("|") for t in true], said)]
        return {f"{how}_f1": f1_score(*table, average=how, zero_division=0.0) for how in ("micro", "macro")}
    if kind == "numbers":
        return {"pearson": stats.pearsonr(true, said).statistic, "spearman": stats.spearmanr(true, said).statistic}
    if kind == "entities":
        return entity_scores(said, true)
    flat = [[tag for row in rows for tag in row] for rows in (true, said)]
    return {"accuracy": accuracy_score(*flat), "macro_f1": f1_score(*flat, average="macro", zero_division=0.0)}


TYPES = {"several labels": "multi_label_classification", "numbers": "regression", "words": None, "entities": None}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "several labels")) for k in KINDS])
def test_data_of_ones_own_from_end_to_end(kind, tmp_path):
    recipe, run, data = KINDS[kind], tmp_path / "run", write_own_data(tmp_path / "data", kind)
    given = (f"model.name={tiny_folder(tmp_path / 'dense')}", f"data.path={data}", f"output={run}")
    ranks = 2 if kind == "pairs" else 1
    assert run_world(_execute, ranks, *recipe, *given) == [0] * ranks
    texts, true, learnt = _examples(data, recipe)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    final = run / ("recovered" if (run / "recovered").exists() else "compact")
    folders = json.dumps([str(run / "teacher" / "model"), str(final)])
    dense, compact = json.loads(run_stranger(STRANGER, tmp_path, folders, tmp_path / "texts.json"))
    assert compact["class"].startswith("Compact")
    report = json.loads((run / "report.json").read_text())
    for name, answers in (("dense", dense), ("compact", compact)):
        assert answers["problem_type"] == TYPES.get(kind, "single_label_classification")
        assert answers["names"] == (["score"] if kind == "numbers" else sorted(_labels(learnt)))
        measured = report[name]["metrics"]
        wanted = _scores(kind, answers["said"], true, answers["names"])
        # Ranks of texts that are nearly equal turn round with the last digit.
        slack = {"spearman": 0.02, "pearson": 1e-4}
        for key, value in wanted.items():
            assert measured[key] == pytest.approx(value, abs=slack.get(key, 1e-6)), (name, key)
        # Not what any order of labels would give.
        assert max(measured.values()) > 0.6, (name, measured)
