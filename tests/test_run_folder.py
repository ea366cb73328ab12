"""One owner of a run's names: what it says, and that nobody else spells them."""

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
    "LOCK",
    "STOP",
    "failures",
    "heartbeats",
    "recovered",
)
"""Names in a run's folder; words that mean other things as well are looked for where a path is built."""


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


def test_nobody_else_builds_the_path_of_a_models_folder():
    built = re.compile(r"""/ ["'](?:compact|recovered|sparse|teacher|prune|consolidate|recover|blocks|evaluate)["']""")
    elsewhere = [
        path.name for path in PACKAGE.rglob("*.py") if path.name != "run_folder.py" and built.search(_code(path))
    ]
    assert elsewhere == []


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
