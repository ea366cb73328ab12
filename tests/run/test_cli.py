"""The commands as users type them, through the real launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.folders import tiny_recipe

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.dist


def _run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_train_consolidate_bench_inspect(tmp_path):
    recipe = tiny_recipe(tmp_path)
    code, out, err = _run("-m", "dsprune", "train", recipe, "--ranks", "2", 'stages=["teacher", "prune"]')
    assert code == 0, err
    code, out, err = _run("-m", "dsprune", "consolidate", tmp_path / "run", tmp_path / "out")
    assert code == 0, err
    assert "masked and compact logits differ by at most" in out
    code, out, err = _run("-m", "dsprune", "consolidate", tmp_path / "run", tmp_path / "out")
    assert code == 73
    assert err.strip().splitlines() == [err.strip()]
    code, out, err = _run(
        *("-m", "dsprune", "bench", tmp_path / "run" / "teacher" / "model", tmp_path / "out"),
        *("--batch", "1", "2", "--length", "16", "--runs", "3", "--json", tmp_path / "bench.json"),
    )
    assert code == 0, err
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 2
    code, out, err = _run("-m", "dsprune", "inspect", tmp_path / "out")
    assert code == 0, err
    assert re.search(r"hidden: \d+ / 32", out)


def test_a_failing_launch_fails(tmp_path):
    recipe = tiny_recipe(tmp_path)
    code, _, err = _run("-m", "dsprune", "train", recipe, "--ranks", "2", 'stages=["consolidate"]')
    assert code != 0
    assert sum("error: stage 'prune' is not finished" in line for line in err.splitlines()) == 1


def test_train_by_path_does_not_let_our_modules_shadow_others(tmp_path):
    """`deepspeed dsprune/train.py` puts dsprune/ first on sys.path; a decoy there must not be imported."""
    code, out, err = _run("-P", ROOT / "dsprune" / "train.py", "--help", cwd=tmp_path)
    assert code == 0, err
    assert "deepspeed dsprune/train.py demo" in out
    probe = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        f"sys.path.insert(0, {str(ROOT / 'dsprune')!r})\n"
        "try: runpy.run_path(sys.path[0] + '/train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"assert {str(ROOT / 'dsprune')!r} not in sys.path, sys.path[:2]"
    )
    code, _, err = _run("-c", probe, cwd=tmp_path)
    assert code == 0, err


def test_dry_run_plans_and_touches_nothing(tmp_path):
    recipe = tiny_recipe(tmp_path)
    code, out, err = _run("-m", "dsprune", "train", recipe, "--dry-run", "--ranks", "2", "prune.target=0.25")
    assert code == 0, err
    for text in ('"target": 0.25', "ffn_dim", "2 rank(s) x 4 x 1", "GiB per rank", "a dry run"):
        assert text in out, text
    assert not (tmp_path / "run").exists()


def test_keys_are_explained():
    code, out, err = _run("-m", "dsprune", "train", "--keys")
    assert code == 0, err
    assert "prune.target = 0.95" in out
    assert "method.warmup" in out


def test_inspect_a_dense_model(tmp_path):
    tiny_recipe(tmp_path)
    code, out, err = _run("-m", "dsprune", "inspect", tmp_path / "dense")
    assert code == 0, err
    assert "a coordinate of the residual stream" in out
    code, _, err = _run("-m", "dsprune", "inspect", tmp_path / "nowhere")
    assert code == 64
    assert err.startswith("error: ")
