"""Folders of data as users have them, of each kind that the tasks on any data read, in words of the tiny tokenizer."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsprune.tasks.benchmarks.order import generate

Rows = list[dict[str, Any]]

COMMON = (
    "task.max_length=32",
    "batch.size=8",
    "batch.eval=8",
    "teacher.duration=100 steps",
    "teacher.lr=4e-3",
    "prune.target=0.5",
    "prune.start=teacher",
    "prune.lr=2e-3",
    "eval.every=100 steps",
    "eval.bench_batch=2",
    "eval.bench_length=16",
    "checkpoint.every=100 steps",
    "log.every=1",
    "log.tensorboard=false",
)
COFI = (
    "cofi_text_classification",
    *COMMON,
    "method.distill_phase=2 steps",
    "method.warmup=8 steps",
    "method.lr=0.1",
    "prune.duration=16 steps",
    "recover.duration=20 steps",
    "recover.lr=2e-3",
)
GRAIN = (
    "grain_token_classification",
    *COMMON,
    "prune.duration=40 steps",
    "prune.embedding_rank=8",
    "distill.teacher_layers=[0, 1, 2]",
)
"""Shipped recipes, made small: recipe and overrides."""

KINDS = {
    "classes": COFI,
    "several labels": (*COFI, "recover.duration=0 steps", "task.multi_label=true", "task.label_separator='|'"),
    "numbers": COFI,
    "pairs": (*COFI, 'data.columns={text = "premise", text_pair = "hypothesis", label = "gold"}', "task.metric=f1"),
    "words": (*GRAIN, 'data.columns={tags = "kinds"}'),
    "entities": GRAIN,
}
"""Kinds of data, and how they are trained on."""


KINDS_OF = {
    "body": "taller shorter stronger weaker heavier lighter",
    "time": "older younger earlier later faster slower",
}
KIND_OF = {word: kind for kind, words in KINDS_OF.items() for word in words.split()}


def write_own_data(folder: Path, kind: str) -> Path:
    """Training and validation files, each kind in a form and with names of its own."""
    folder.mkdir(parents=True)
    examples = generate(11, num_train=300, num_validation=40)
    rows = [[_row(kind, example) for example in split] for split in examples]
    if kind == "classes":
        _write_csv(folder / "train.csv", rows[0], ";")
        _write_csv(folder / "dev.csv", rows[1], ";")
    elif kind == "several labels":
        _write_csv(folder / "train.tsv", rows[0], "\t")
        _write_csv(folder / "val.tsv", rows[1], "\t")
    elif kind == "numbers":
        (folder / "data").mkdir()
        for i in range(2):
            _write_lines(folder / "data" / f"train-0000{i}-of-00002.jsonl", rows[0][i * 150 : (i + 1) * 150])
        _write_lines(folder / "data" / "validation-00000-of-00001.jsonl", rows[1])
    elif kind == "pairs":
        (folder / "train.json").write_text(json.dumps({"data": rows[0]}, indent=2))
        (folder / "valid.json").write_text(json.dumps({"data": rows[1]}, indent=2))
    else:
        _write_lines(folder / "train.jsonl", rows[0])
        _write_lines(folder / "validation.jsonl", rows[1])
    return folder


def _row(kind: str, example: Any) -> dict[str, Any]:
    """One example: what is to be told of a text can be seen in its words."""
    words = example.premise.rstrip(".").split()
    kinds = sorted({KIND_OF.get(word, "else") for word in words if word.endswith("er")})
    if kind == "classes":
        return {"text": example.premise, "label": kinds[0]}
    if kind == "several labels":
        return {"text": example.premise, "label": "|".join(name for name in kinds if name != "else")}
    if kind == "numbers":
        return {"text": example.premise, "label": (len(words) - 7) / 4 + (len(words[2]) - 6) / 10}
    if kind == "pairs":
        answer = "no" if words[2] < "o" else "yes"
        return {"premise": example.premise, "hypothesis": example.hypothesis, "gold": answer}
    if kind == "words":
        return {"tokens": words, "kinds": ["NAME" if word[0].isupper() else f"W{len(word)}" for word in words]}
    tags = ["B-PER" if word[0].isupper() else "O" for word in words]
    return {"tokens": words, "tags": [*tags[:-1], "B-LAST" if tags[-1] == "B-PER" else "O"]}


def _write_csv(path: Path, rows: Rows, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
