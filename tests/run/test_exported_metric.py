"""Invariant 8: the metric in the run = that in the report = that of the exported folder in plain transformers, where
labels are read by `id2label` and dsprune is not there. For every task with labels, every family and every stage.

All models begin with a head whose labels have the task's names in another order. A case of it on two ranks at ZeRO-3
is in test_stages.py.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen2Tokenizer

from dsprune.config import DataConfig, TaskConfig, load_config
from dsprune.methods import method_options
from dsprune.tasks import build_task
from dsprune.tasks.benchmarks.glue import GLUE
from dsprune.tasks.benchmarks.order import PROPERTIES, generate
from dsprune.tasks.kinds.seq2seq import text_scores
from tests.helpers.exported import measure, perplexities, predict, write
from tests.helpers.folders import METHODS, RECIPE, encoder_decoder_recipe, language_recipe, tiny_tokenizer
from tests.helpers.models import ALL
from tests.helpers.world import run_world

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ENCODERS = ("bert", "roberta", "distilbert", "electra", "deberta-v2")
FAMILIES = (*ENCODERS, "llama-sequence", "qwen2-sequence", "gpt2-sequence")
MODELS = ("teacher/model", "compact", "recovered")
SCALE = 5.0


class _Finished:
    """An export that is over when it begins."""

    stdout = None

    def poll(self):
        return 0


def _execute(recipe, *overrides):
    """A launch on this rank that exports in this process: starting another takes as long as everything else."""
    from dsprune.cli import guarded
    from dsprune.consolidate import consolidate
    from dsprune.run import exporting
    from dsprune.run.launch import execute

    def export(checkpoint, out):
        consolidate(checkpoint, out, force=True)
        return _Finished()

    exporting.start_export = export
    return guarded(lambda: execute(str(recipe), overrides))


def _kind(text):
    """Which property a text is about: what its label is read off."""
    words = re.findall(r"\w+", text.lower())
    return next(i for i, pair in enumerate(PROPERTIES) if any(word in pair for word in words))


def _rows(task, count, seed):
    """Examples of a task whose labels are plain from the words, some labels more frequent than others."""
    texts = [(one.premise, one.hypothesis) for one in generate(seed, num_train=count, num_validation=2)[0]]
    if task == "conll2003":
        return [_tagged(premise) for premise, _ in texts]
    columns, labels = GLUE[task].columns, GLUE[task].labels
    rows = []
    for premise, hypothesis in texts:
        kind = _kind(hypothesis)
        label = min(kind % 4, len(labels) - 1) if labels else SCALE * kind / (len(PROPERTIES) - 1)
        rows.append({**dict(zip(columns, (hypothesis, premise), strict=False)), "label": label})
    return rows


def _tagged(text):
    """Persons, and comparisons as places of one word or two."""
    words = text.replace(".", "").split()
    known = {word for pair in PROPERTIES for word in pair}
    tags = ["B-LOC" if word in known else "B-PER" if word[0].isupper() else "O" for word in words]
    for i, word in enumerate(words):
        if word == "than":
            tags[i] = "I-LOC"
    return {"tokens": words, "ner_tags": tags}


def _write_data(folder, task):
    folder.mkdir()
    splits = {"train": _rows(task, 128, 7)}
    names = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    names += ["test"] if task == "conll2003" else []
    splits |= {name: _rows(task, 30 + 10 * i, 11 + i) for i, name in enumerate(names)}
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return splits


def _byte_level():
    """What AutoTokenizer takes every tokenizer of a Qwen2 for, whatever its files say."""
    backend = ByteLevelBPETokenizer()
    texts = [f"{one.premise} {one.hypothesis}" for one in generate(7, num_train=500, num_validation=2)[0]]
    backend.train_from_iterator(texts, vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    learned = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]])


def _write_model(folder, family, task):
    """A model of a family with the task's head, its labels in reverse and in capitals."""
    tokenizer = _byte_level() if family.startswith("qwen2") else tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    config = ALL[family]().config
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id, config.eos_token_id = 2, 3
    config.initializer_range = 0.2  # a model of this width learns nothing from the usual ones in a few steps
    labels = [label.upper() for label in reversed(task.labels)] or ["LABEL_0"]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in config.id2label.items()}
    from dsprune.engine.models.loading_plan import AUTO_CLASSES

    torch.manual_seed(0)
    AUTO_CLASSES[task.head].from_config(config).save_pretrained(folder)


def _run(folder, task, family, data):
    built = build_task(TaskConfig(name=task), DataConfig(path=str(data)), seed=0)
    _write_model(folder / "dense", family, built)
    recipe = folder / "case.toml"
    text = RECIPE.format(model=folder / "dense", output=folder / "run", method=METHODS["cofi"].strip())
    recipe.write_text(re.sub(r"max_(train|eval)_examples = \d+\n", "", text), encoding="utf-8")
    overrides = (
        f"task.name={task}",
        f"data.path={data}",
        "seed=4",  # with which every family learns something in so few steps
        "deepspeed.student=zero1",
        "deepspeed.teacher=teacher",
        "teacher.duration=120 steps",
        "teacher.lr=3e-3",
        "prune.target=0.3",
        "prune.lr=1e-3",
        "recover.lr=1e-3",
        "eval.every=500 steps",
        "checkpoint.every=500 steps",
        "log.tensorboard=false",
    )
    assert run_world(_execute, 1, recipe, *overrides) == [0], (task, family)
    return folder / "run"


def _metrics(run):
    """In the run and in the report, by folder."""
    done = {stage: json.loads((run / stage / "done.json").read_text())["metrics"] for stage in ("teacher", "recover")}
    report = json.loads((run / "report.json").read_text())
    return {
        "teacher/model": (done["teacher"], report["dense"]["metrics"]),
        "recovered": (done["recover"], report["compact"]["metrics"]),
    }


def _score_here(folder, task, data):
    """What the engine itself says of a folder: the report has no row for the compact model before recovery."""
    from dsprune.engine.learning.evaluate import evaluate_all
    from dsprune.engine.models.load import load_model, load_tokenizer
    from dsprune.engine.ranks.world import start_world

    built = build_task(TaskConfig(name=task, max_length=32), DataConfig(path=str(data)), seed=0)
    model = load_model(str(folder), built, {}).eval()
    evals = built.load(load_tokenizer(str(folder))).evals
    forward = lambda inputs, labels: built.outputs(model(**inputs))  # noqa: E731
    return evaluate_all(forward, built, evals, start_world(), batch_size=8, before_batch=lambda: None)


def _compare(task, families, tmp_path):
    data = tmp_path / "data"
    splits = _write_data(data, task)
    built = build_task(TaskConfig(name=task), DataConfig(path=str(data)), seed=0)
    runs = {}
    for family in families:
        (tmp_path / family).mkdir()
        runs[family] = _run(tmp_path / family, task, family, data)
    folders = [run / name for run in runs.values() for name in MODELS]
    for split, rows in splits.items():
        if split == "train":
            continue
        texts = [[row["tokens"]] if task == "conll2003" else [row[column] for column in built.columns] for row in rows]
        said = predict(folders, texts, built.head, tmp_path)
        truth = [row["ner_tags"] if task == "conll2003" else _name(built, row["label"]) for row in rows]
        for family, run in runs.items():
            _compare_run(built, run, split, said, truth, data)
            _would_tell(built, truth, said[run / "teacher/model"], family)


def _would_tell(task, truth, said, family):
    """See that labels in another order give another metric: answers that do not hang on them would show nothing."""
    positive = task.labels[-1] if task.labels else None
    metric = measure(task.primary, truth, said, positive)
    if not task.labels:
        assert metric > 0.3, f"{family}: {metric}"
        return
    other = dict(zip(task.labels, reversed(task.labels), strict=True))
    turned = [[other[tag] for tag in one] if isinstance(one, list) else other[one] for one in said]
    assert abs(metric - measure(task.primary, truth, turned, positive)) > 0.02, f"{family}: {metric}"


def _name(task, label):
    return task.labels[label] if task.labels else label


def _compare_run(task, run, split, said, truth, data):
    shown = split.removeprefix("validation_")
    key = lambda name: name if split == "validation" and task.name != "conll2003" else f"{shown}/{name}"  # noqa: E731
    inside = _metrics(run) | {"compact": (run_world(_score_here, 1, run / "compact", task.name, data)[0],) * 2}
    for folder in MODELS:
        config = json.loads((run / folder / "config.json").read_text())
        if task.labels:
            assert list(config["id2label"].values()) == list(task.labels)
        for name in task.metrics:
            if name in ("precision", "recall"):
                continue
            theirs = measure(name, truth, said[run / folder], task.labels[-1] if task.labels else None)
            for ours in inside[folder]:
                assert ours[key(name)] == pytest.approx(theirs, abs=2e-5 if task.labels else 2e-3), (run, folder, name)


@pytest.mark.parametrize("task", GLUE)
def test_sequences(task, tmp_path):
    _compare(task, FAMILIES, tmp_path)


def test_tokens(tmp_path):
    _compare("conll2003", ENCODERS, tmp_path)


@pytest.mark.parametrize("own", [False, True], ids=["tied", "own head"])
def test_text(own, tmp_path):
    """Perplexity, on a model whose configuration ties a head that is one of its own in its files."""
    recipe = language_recipe(tmp_path)
    overrides = ("log.tensorboard=false",)
    if own:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(1)
        folder = tmp_path / "dense"
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        head = {"lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"]) * 0.05}
        save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
        overrides = (*overrides, "model.from_scratch=false")
    assert run_world(_execute, 2, recipe, *overrides) == [0, 0]
    run = tmp_path / "run"
    inside = _metrics(run)
    theirs = perplexities([run / name for name in MODELS], _validation(recipe, overrides), tmp_path)
    for folder, found in inside.items():
        for ours in found:
            assert ours["perplexity"] == pytest.approx(theirs[run / folder], rel=1e-4)
    for name in MODELS:
        config = json.loads((run / name / "config.json").read_text())
        assert config.get("tie_word_embeddings", True) is not own, name
        assert ("lm_head.weight" in load_file(run / name / "model.safetensors")) is own


def test_written_text(tmp_path):
    """What an encoder-decoder writes, with settings of generation that change it."""
    recipe = encoder_decoder_recipe(tmp_path, task="seq2seq")
    settings = {"repetition_penalty": 1.7, "decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(settings))
    overrides = ("task.max_target_length=12", "teacher.duration=60 steps", "distill.teacher_layers=[1, 2, 3, 4]")
    assert run_world(_execute, 2, recipe, *overrides) == [0, 0]
    run = tmp_path / "run"
    batch = _validation(recipe, overrides)
    batch.pop("labels")
    rows = [json.loads(line) for line in (tmp_path / "text" / "validation.jsonl").read_text().splitlines()]
    said = write([run / name for name in MODELS], batch, 12, tmp_path)
    for folder, found in _metrics(run).items():
        theirs = text_scores(said[run / folder], [row["target"] for row in rows])
        assert theirs["rougeL"] > 0.2
        for ours in found:
            assert ours == pytest.approx(theirs, abs=1e-6), folder
        assert json.loads((run / folder / "generation_config.json").read_text()) == settings


def _validation(recipe: Path, overrides):
    """The whole validation split, as the run sees it."""
    from dsprune.engine.models.load import load_tokenizer

    config = load_config(str(recipe), overrides, method_options=method_options)
    task = build_task(config.task, config.data, seed=config.seed)
    data = task.load(load_tokenizer(config.model.name)).evals["validation"]
    return data.collate(list(range(len(data))))
