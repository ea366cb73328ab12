"""Promises about the package as a whole."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import dsprune

ROOT = Path(dsprune.__file__).parent


def test_no_module_shadows_another():
    """`deepspeed dsprune/train.py` once put this folder first on sys.path; names must be safe even so."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    ours -= {"__init__", "__main__", "__pycache__"}
    theirs = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) - {"dsprune"}
    assert not ours & theirs


def test_the_library_needs_no_deepspeed():
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import dsprune, dsprune.structure, dsprune.consolidate, dsprune.methods, dsprune.distill, dsprune.tasks\n"
        "import dsprune.measure.bench, dsprune.migrate, dsprune.run.reporting.scorecard"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_are_explained():
    for name in dsprune.__all__:
        value = getattr(dsprune, name)
        assert isinstance(value, str) or value.__doc__, name
