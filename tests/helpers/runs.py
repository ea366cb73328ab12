"""Short runs of the prune stage to do harm to, and the comparison of what came of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, BertForSequenceClassification

from tests.helpers.folders import tiny_folder, tiny_recipe

STEPS = 6
SAVE_EVERY = 2


def ground(folder: Path) -> Path:
    """A tiny dense model and a teacher of random weights: nobody has to be trained first."""
    dense = tiny_folder(folder / "dense")
    config = AutoConfig.from_pretrained(
        dense, num_labels=2, id2label={0: "contradicts", 1: "follows"}, label2id={"contradicts": 0, "follows": 1}
    )
    torch.manual_seed(3)
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "teacher" / name).write_bytes((dense / name).read_bytes())
    tiny_recipe(folder)
    return folder


def words(place: Path, run: Path, *, method: str = "cofi", student: str = "zero2") -> tuple[str, ...]:
    """Recipe and overrides of a run of the prune stage: six steps, a checkpoint every two, evaluation every four."""
    recipe = place / f"{method}.toml"
    if not recipe.exists():
        tiny_recipe(place, method=method).rename(recipe)
    return (
        str(recipe),
        f"output={run}",
        f"teacher.path={place / 'teacher'}",
        f"deepspeed.student={student}",
        "deepspeed.teacher=teacher",
        'stages=["prune"]',
        "log.tensorboard=false",
        f"checkpoint.every={SAVE_EVERY} steps",
        "cluster.timeout_minutes=0.5",
    )


def execute(*words: str) -> int:
    """What a rank of a launch does, in this process; returns its exit code."""
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    return guarded(lambda: execute(words[0], words[1:]))


def checkpoints(run: Path, stage: str = "prune") -> list[str]:
    """Names in a stage's folder of checkpoints."""
    folder = run / stage / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def history(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def assert_same(run: Path, reference: Path) -> None:
    """Bit for bit: every line of metrics, the last gates, the last weights."""
    from dsprune.consolidate import open_checkpoint

    assert history(run) == history(reference)
    last = Path("prune") / "checkpoints" / f"step-{STEPS:08d}"
    ours, theirs = (load_file(folder / last / "replica.safetensors") for folder in (run, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    weights = [open_checkpoint(folder / last) for folder in (run, reference)]
    for name in weights[1].names():
        assert torch.equal(weights[0].read(name), weights[1].read(name)), name
