"""One owner of a run's names: what it says, and that nobody else spells them."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest

import dsprune
from dsprune.errors import CheckpointError, ConfigError
from dsprune.files import write_json
from dsprune.run_folder import STAGES, TRAINING_STAGES, RunFolder, checkpoint_name

PACKAGE = Path(dsprune.__file__).parent
NAMES = (
    "provenance.json",
    "metrics.jsonl",
    "status.json",
    "numerics.json",
    "done.json",
    "report.json",
    "report.png",
    "MANIFEST.json",
    "state.json",
    "state.safetensors",
    "replica.safetensors",
    "selection.safetensors",
    "figures.json",
    "verify.safetensors",
    "LOCK",
    "STOP",
    "failures",
    "heartbeats",
    "recovered",
)
"""Names that mean nothing else: wherever they stand, they are a run's."""
WORDS = (
    *("checkpoints", "tensorboard", "stacks", "model"),
    *("compact", "recovered", "sparse", "teacher", "prune", "consolidate", "recover", "blocks", "evaluate"),
)
"""Names that are words as well: they are a run's where a path is built."""
JOINERS = {"join", "joinpath", "Path", "PurePath", "RunFolder", "with_name", "glob", "rglob", "relative_to"}
"""Calls that make paths of their arguments."""


def _code(path):
    """A module's text without docstrings and comments: what it tells people may name files."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text(encoding="utf-8"))
    return re.sub(r"#.*", "", text)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_else_spells_a_name_of_the_run_folder(name):
    spelling = re.compile(rf"""["']{re.escape(name)}["']""")
    elsewhere = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "run_folder.py" and spelling.search(_code(path))
    ]
    assert elsewhere == []


@functools.cache
def _built_elsewhere():
    """Words in the paths that each file of the package builds, but for the owner's."""
    others = (path for path in PACKAGE.rglob("*.py") if path.name != "run_folder.py")
    return {p.relative_to(PACKAGE).as_posix(): set(_paths_built(ast.parse(p.read_text("utf-8")))) for p in others}


def _paths_built(tree):
    """Words in paths that code builds: `a / "word"`, `joinpath("word")`, `Path(a, "word")`, `f"{a}/word"`."""
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            parts = node.args if name in JOINERS else []
        elif isinstance(node, ast.JoinedStr) and any("/" in str(getattr(part, "value", "")) for part in node.values):
            parts = node.values
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield from part.value.split("/")


@pytest.mark.parametrize("name", WORDS)
def test_nobody_else_builds_a_path_with_a_word_of_the_run_folder(name):
    assert [path for path, words in _built_elsewhere().items() if name in words] == []


@pytest.mark.parametrize(
    "code",
    [
        'run / "stacks"',
        'run / "stacks" / name',
        '"stacks" / run',
        'run / "prune/stacks"',
        'run.joinpath("prune", "stacks")',
        'os.path.join(run, "stacks")',
        'pathlib.Path(run, "stacks")',
        'run.glob("stacks/rank-*")',
        'f"{run}/stacks"',
        'f"{run}/stacks/{name}"',
    ],
)
def test_every_way_to_build_a_path_is_seen(code):
    assert "stacks" in _paths_built(ast.parse(code))


@pytest.mark.parametrize("code", ['x.stacks("stacks")', 'f"{n} stacks: a/b"', '{"stacks": 2}', "run.stacks"])
def test_a_word_that_means_something_else_is_none(code):
    assert "stacks" not in _paths_built(ast.parse(code))


def _model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_the_last_model_is_the_one_of_the_last_stage_that_left_one(tmp_path):
    run = RunFolder(tmp_path)
    assert run.last_model() is None
    assert run.newest_model() is None
    _model(tmp_path / "teacher" / "model")
    assert run.newest_model() == tmp_path / "teacher" / "model"
    for name in ("compact", "recovered", "sparse"):
        _model(tmp_path / name)
        assert run.last_model() == tmp_path / name
    assert run.last_model(before="blocks") == tmp_path / "recovered"
    assert run.last_model(before="recover") == tmp_path / "compact"


def _checkpoint(run, stage, step, score=None):
    folder = run.checkpoints(stage) / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text(json.dumps({"score": score}))
    return folder


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_a_stage_exports_its_best_or_its_last(tmp_path, stage):
    run = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint: let stage"):
        run.chosen_checkpoint(stage)
    _checkpoint(run, stage, 2, 0.7)
    best = _checkpoint(run, stage, 4, 0.9)
    last = _checkpoint(run, stage, 6, 0.8)
    (run.checkpoints(stage) / "step-00000008.tmp").mkdir()
    assert run.chosen_checkpoint(stage) == (best if STAGES[stage].exports == "best" else last)


def test_what_a_finished_stage_chose_counts_even_where_the_run_was_moved(tmp_path):
    run = RunFolder(tmp_path)
    first = _checkpoint(run, "recover", 2, 0.1)
    _checkpoint(run, "recover", 4, 0.9)
    (tmp_path / "recover").mkdir(exist_ok=True)
    write_json(run.done_file("recover"), {"settings": {}, "checkpoint": "/elsewhere/recover/checkpoints/step-00000002"})
    assert run.chosen_checkpoint("recover") == first


def test_done_with_other_settings_is_refused(tmp_path):
    tables = {name for spec in STAGES.values() for name in spec.settings}
    config = {name: {"a": 1} for name in (*tables, "model", "task", "data")} | {
        "seed": 1,
        "batch": {"size": 8, "micro": 2},
    }
    run = RunFolder(tmp_path)
    assert not run.is_done("prune", config)
    run.mark_done("prune", config, checkpoint="x")
    assert run.is_done("prune", config | {"batch": {"size": 8, "micro": 4}})
    assert run.is_done("prune", config | {"recover": {"a": 2}})
    with pytest.raises(ConfigError, match="finished with other settings of distill"):
        run.is_done("prune", config | {"distill": {"a": 2}})


def test_every_stage_needs_stages_before_it():
    names = list(STAGES)
    for name, spec in STAGES.items():
        assert all(names.index(need) < names.index(name) for need in spec.needs)
