import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsprune.consolidate import consolidate, find_checkpoint, load_compact, verify
from dsprune.consolidate.manifest import render_manifest, sha256
from dsprune.errors import CheckpointError, ConfigError, OutputError
from dsprune.structure import Selection
from tests.helpers.checkpoints import save_run
from tests.helpers.models import tiny_batch
from tests.helpers.settings import BLOCKS, ROWS
from tests.helpers.stranger import run_stranger
from tests.helpers.training import Setup

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(Setup(ROWS[0], stage=3), 2, folder)
    return folder


@pytest.fixture
def run(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "run"))


def _checkpoint(run):
    return run / "prune" / "checkpoints" / "step-00000003"


def test_a_run_becomes_a_folder(run, tmp_path):
    report = consolidate(run, tmp_path / "out")
    assert report.difference < 1e-5
    model = load_compact(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == report.parameters
    assert report.encoder_sparsity >= ROWS[0].target - 1e-9
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{report.parameters:,}" in card
    assert "trust_remote_code=True" in card


def test_twice_gives_the_same_bytes(run, tmp_path):
    for name in ("a", "b"):
        consolidate(run, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_heads_are_padded_to_the_multiple_that_was_asked_for(run, tmp_path):
    consolidate(run, tmp_path / "out", head_multiple=16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dsprune"]["head_multiple"] == 16
    with pytest.raises(ConfigError, match="give 1 or more"):
        consolidate(run, tmp_path / "other", head_multiple=0)


LOAD_ELSEWHERE = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
folder, batch, out, again = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
model.save_pretrained(again)
model = AutoModelForSequenceClassification.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**load_file(batch)).logits, out)
"""


@pytest.mark.parametrize(
    "row",
    [ROWS[0], BLOCKS, *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS[1:])],
    ids=lambda row: row.name,
)
def test_it_loads_and_saves_where_dsprune_is_not_installed(row, tmp_path):
    save_run(Setup(row, stage=2), 1, tmp_path / "run")
    report = consolidate(tmp_path / "run", tmp_path / "out")
    assert report.parameters == sum(p.numel() for p in load_compact(tmp_path / "out").parameters())
    batch = tiny_batch()
    save_file(batch, tmp_path / "batch.safetensors")
    paths = [tmp_path / name for name in ("out", "batch.safetensors", "logits.pt", "again")]
    run_stranger(LOAD_ELSEWHERE, tmp_path, *paths)
    with torch.no_grad():
        expected = load_compact(tmp_path / "out").eval()(**batch).logits
    # Another process may use another number of threads, hence another order of sums.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_request(run, tmp_path, dtype):
    consolidate(run, tmp_path / "out", dtype=dtype)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def _break_manifest(run):
    (_checkpoint(run) / "MANIFEST.json").unlink()


def _truncate(run):
    path = _checkpoint(run) / "student" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-10])


def _flip(run):
    path = _checkpoint(run) / "student" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _remove(run):
    (_checkpoint(run) / "verify.safetensors").unlink()


def _reset_hashes(run):
    """Make the manifest agree with changed files, as if they had been written so."""
    path = _checkpoint(run) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        file = _checkpoint(run) / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    del manifest["digest"]
    path.write_text(render_manifest(manifest))


def _other_model(run):
    path = _checkpoint(run) / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 128}))
    _reset_hashes(run)


def _only_incomplete(run):
    _checkpoint(run).rename(_checkpoint(run).with_name("step-00000003.tmp"))
    (run / "prune" / "checkpoints" / "step-00000003.tmp" / "MANIFEST.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_manifest, "holds only incomplete saves"),
        (_only_incomplete, "holds only incomplete saves"),
        (_truncate, "it is damaged"),
        (_flip, "its hash differs"),
        (_remove, r"verify\.safetensors is missing"),
        (_other_model, "weights of another model"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_error_and_leaves_nothing(run, tmp_path, damage, message):
    damage(run)
    with pytest.raises(CheckpointError, match=message):
        consolidate(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_result_that_differs_is_never_renamed(run, tmp_path, monkeypatch):
    real = verify.SafetensorsReader.__call__
    monkeypatch.setattr(verify.SafetensorsReader, "__call__", lambda self, name: real(self, name) * 1.01)
    with pytest.raises(CheckpointError, match="logits differ"):
        consolidate(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_wrong_gates_is_refused(run, tmp_path):
    path = _checkpoint(run) / "selection.safetensors"
    selection = Selection.load(path)
    selection.gates["hidden"].zero_()
    selection.save(path)
    _reset_hashes(run)
    with pytest.raises(CheckpointError, match="impossible selection"):
        consolidate(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_not_touched(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        consolidate(run, out)
    assert (out / "precious.txt").read_text() == "mine"
    consolidate(run, out, force=True)
    assert not (out / "precious.txt").exists()


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="float8"):
        consolidate(tmp_path, tmp_path / "out", dtype="float8")


def test_killed_half_way_leaves_no_folder(run, tmp_path):
    code = (
        "import os, sys\n"
        "from dsprune.consolidate import export\n"
        "from dsprune.consolidate.writer import SafetensorsStream\n"
        "real, count = SafetensorsStream.write, [0]\n"
        "def write(self, name, tensor):\n"
        "    count[0] += 1\n"
        "    if count[0] == 5: os._exit(9)\n"
        "    real(self, name, tensor)\n"
        "SafetensorsStream.write = write\n"
        "export.consolidate(sys.argv[1], sys.argv[2])\n"
    )
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code, str(run), str(tmp_path / "out")], env=env, check=False)
    assert done.returncode == 9
    assert not (tmp_path / "out").exists()
    consolidate(run, tmp_path / "out")
