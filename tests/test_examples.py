"""The examples run, as their files have them, with a tiny model and few steps in the place of long ones."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.folders import tiny_folder
from tests.helpers.own_data import COFI
from tests.helpers.world import run_world

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
REVIEWS = (
    ("alice is taller", "good"),
    ("bob is shorter", "bad"),
    ("carol is older", "good"),
    ("dave is younger", "bad"),
)


def _python(*words, path=""):
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, check=False)


def test_library():
    done = _python("library.py", path=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "encoder sparsity 42.1%, total 29.8%",
        "largest difference below 1e-6: True",
        "parameters 7837442 counted 7837442",
    ]


def _execute(*words):
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    return guarded(lambda: execute(words[0], words[1:]))


@pytest.mark.dist
def test_reviews_and_what_they_leave(tmp_path):
    """The README's recipe, then the folder that it leaves in plain transformers."""
    data = tmp_path / "reviews"
    data.mkdir()
    for name in ("train", "validation"):
        with (data / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("review", "stars"), *REVIEWS * 4])
    run = tmp_path / "run"
    overrides = (
        *(word for word in COFI[1:] if not word.startswith(("teacher.duration", "recover.duration"))),
        f"model.name={tiny_folder(tmp_path / 'dense')}",
        f"data.path={data}",
        f"output={run}",
        "teacher.duration=4 steps",
        "recover.duration=4 steps",
        'stages=["teacher", "prune", "consolidate", "recover"]',
    )
    assert run_world(_execute, 1, str(EXAMPLES / "reviews.toml"), *overrides) == [0]
    done = _python("classify.py", run / "recovered", *(text for text, _ in REVIEWS))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(": ")[1] for line in lines] == [text for text, _ in REVIEWS]
    assert {line.split(" (")[0] for line in lines} <= {"good", "bad"}
