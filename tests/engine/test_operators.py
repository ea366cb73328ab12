"""What is compiled, what is not, and that nobody waits for the dead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsprune.engine.zero import operators
from dsprune.engine.zero.config import load_ds_config
from dsprune.engine.zero.operators import build_operators
from dsprune.errors import ConfigError
from tests.helpers.runs import STEPS, execute, ground, words
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, trajectory
from tests.helpers.world import run_world


def test_nothing_is_compiled_where_nothing_is_offloaded(tmp_path):
    code = "from dsprune.engine.ranks.world import start_world; start_world(); print('started')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "started" in done.stdout, done.stderr
    assert "built" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_offloaded_optimizer_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(operators.shutil, "which", lambda tool: None)
    with pytest.raises(ConfigError, match=r"compiled at first use and needs g\+\+ and ninja"):
        build_operators(load_ds_config("zero3"), load_ds_config("zero3_offload"), say=print)


def _after_a_kill(setup):
    from deepspeed.ops.op_builder import CPUAdamBuilder

    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / CPUAdamBuilder.NAME
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").touch()
    build_operators(load_ds_config("zero3_offload"), say=print)
    return trajectory(setup)["losses"]


@pytest.mark.dist
@pytest.mark.slow
def test_an_offloaded_optimizer_trains_though_a_compilation_was_killed():
    """The file that torch's compilation left would make every later launch wait for ever. Compiles for a minute."""
    (ours,) = run_world(_after_a_kill, 1, Setup(ROWS[0], stage=3, precision="offload"))
    (whole,) = run_world(trajectory, 1, Setup(ROWS[0], stage=3))
    for step, other in zip(ours, whole["losses"], strict=True):
        assert step["total"] == pytest.approx(other["total"], rel=1e-4)


@pytest.mark.dist
@pytest.mark.slow
def test_a_student_on_nvme_trains_as_one_in_memory(tmp_path):
    """Compiles for a few minutes where that was not done before."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio (Debian and Ubuntu: libaio-dev)")
    place = ground(tmp_path)
    nvme = load_ds_config("zero3_nvme")
    for part in ("offload_optimizer", "offload_param"):
        nvme["zero_optimization"][part]["nvme_path"] = str(tmp_path)
    (tmp_path / "nvme.json").write_text(json.dumps(nvme))
    losses = {}
    for student in (str(tmp_path / "nvme.json"), "zero3"):
        run = tmp_path / Path(student).stem
        assert run_world(execute, 2, *words(place, run, student=student), timeout=600) == [0, 0]
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses[run.name] = [row["loss/total"] for row in rows if "loss/total" in row]
    assert len(losses["nvme"]) == STEPS
    assert losses["nvme"] == pytest.approx(losses["zero3"], rel=1e-4)
