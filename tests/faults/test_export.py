"""Faults 29, 30: consolidation is killed, run twice, given what it must not export."""

import json
import os
import shutil
import signal

import pytest

from dsprune.consolidate import consolidate, export
from dsprune.errors import CheckpointError
from dsprune.structure import Selection, analyze
from tests.helpers.checkpoints import write_manifest, write_run
from tests.helpers.models import tiny_model
from tests.helpers.selections import random_gates


@pytest.fixture
def run(tmp_path):
    model = tiny_model("bert")
    structure = analyze(model)
    return write_run(tmp_path / "run", model, selection=Selection.from_gates(structure, random_gates(structure, 3)))


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _kill(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


POINTS = {
    "before the first tensor": ("_Export._run_cut", None),
    "amid the tensors": ("SafetensorsStream.write", 5),
    "before the comparison": ("_Export._verify_cut", None),
    "before the configuration": ("write_side_files", None),
    "before the rename": ("os.fsync", None),
}


def _killed_export(run, out, point):
    target, count = POINTS[point]
    *owner, name = target.split(".")
    scope = getattr(export, owner[0]) if owner else export
    # Before the fork: a child that fails here would go on as a second pytest.
    real, calls = getattr(scope, name), []
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def maybe(*args, **kwargs):
        calls.append(None)
        if count is None or len(calls) == count:
            _kill()
        return real(*args, **kwargs)

    setattr(scope, name, maybe)
    try:
        consolidate(run, out, force=True)
    finally:
        os._exit(0)


@pytest.mark.parametrize("before", ["nothing", "an older export"])
@pytest.mark.parametrize("point", POINTS)
def test_f29_killed_half_way(run, tmp_path, point, before):
    out = tmp_path / "out"
    if before != "nothing":
        consolidate(run, out)
    earlier = _bytes(out) if out.exists() else None
    assert _killed_export(run, out, point) == -signal.SIGKILL, "the point was never reached"
    assert (_bytes(out) if out.exists() else None) == earlier, "absent, or what it was"
    consolidate(run, out, force=True)
    whole = _bytes(out)
    assert earlier is None or whole == earlier
    assert not list(tmp_path.glob(".out*")), "what the killed one left is swept"


def test_f29_killed_between_two_renames(run, tmp_path):
    out = tmp_path / "out"
    consolidate(run, out)
    whole = _bytes(out)
    out.rename(tmp_path / f".out.old-{2**22 - 1}")
    consolidate(run, tmp_path / "out", force=True)
    assert _bytes(out) == whole
    assert not list(tmp_path.glob(".out*"))


def test_f29_twice_is_the_same_bytes(run, tmp_path):
    for name in ("first", "second"):
        consolidate(run, tmp_path / name)
    assert _bytes(tmp_path / "first") == _bytes(tmp_path / "second")


def test_f29_uncommitted_or_of_another_model(run, tmp_path):
    checkpoint = run / "prune" / "checkpoints" / "step-00000001"
    scratch = checkpoint.with_suffix(".tmp")
    shutil.copytree(checkpoint, scratch)
    (scratch / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"MANIFEST.json") as caught:
        consolidate(scratch, tmp_path / "out")
    assert caught.value.exit_code == 74
    config = json.loads((checkpoint / "model" / "config.json").read_text())
    (checkpoint / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (checkpoint / "MANIFEST.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError):
        consolidate(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_f30_what_was_written_is_not_what_was_trained(run, tmp_path, monkeypatch):
    real = export.cut

    def damaged(param, value, selection):
        out = real(param, value, selection)
        return out + 0.01 if param.name == "classifier.bias" else out

    monkeypatch.setattr(export, "cut", damaged)
    with pytest.raises(CheckpointError, match=r"logits differ by .*; nothing was exported"):
        consolidate(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
