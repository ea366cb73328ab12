"""Smoke tests on one GPU: two steps in bf16 and fp16 at ZeRO 2 and 3, a forced overflow, consolidation, bench.

Each runs in a fresh process: CUDA cannot be used in a process that was forked from one that has.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.folders import METHODS, tiny_recipe

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu


def _dsprune(*words):
    command = [sys.executable, "-m", "dsprune", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_on_one_gpu(tmp_path, stage, precision, method):
    recipe = tiny_recipe(tmp_path, method=method)
    done = _dsprune("train", recipe, f"deepspeed.student=zero{stage}_{precision}", "deepspeed.teacher=teacher")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["landing"]["measured"] >= report["landing"]["target"] - 1e-9


OVERFLOW = """
import sys
import torch
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, build_trainer, spoiled

trainer = build_trainer(Setup(ROWS[0], stage=int(sys.argv[1]), precision="fp16"))
applied = [trainer.step(step).applied for step in range(2)]
before = trainer.replica.fingerprint()
teach = trainer.teacher.teach
trainer.teacher.teach = spoiled(teach, float("inf"))
result = trainer.step(2)
assert not result.applied, "an overflow was applied"
assert trainer.replica.fingerprint() == before, "the gates moved in a step that the weights skipped"
trainer.teacher.teach = teach
while not trainer.step(3).applied:
    pass
assert trainer.replica.fingerprint() != before
assert all(torch.isfinite(v).all() for v in trainer.replica.method.parameters().values())
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_gates_skip_the_steps_that_fp16_skips(stage):
    done = subprocess.run(
        [sys.executable, "-c", OVERFLOW, str(stage)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


def test_bench_on_the_gpu(tmp_path):
    recipe = tiny_recipe(tmp_path)
    done = _dsprune("train", recipe, 'stages=["teacher", "prune", "consolidate"]')
    assert done.returncode == 0, done.stderr
    models = (tmp_path / "run" / "teacher" / "model", tmp_path / "run" / "compact")
    done = _dsprune("bench", *models, "--length", 16, "--batch", 4, "--dtype", "float16", "--json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    assert "NVIDIA" in json.loads((tmp_path / "b.json").read_text())["device"]
