"""Faults 7, 8, 9, 25, 28, 31: what lies in a run folder is not what was written, or not what is wanted now."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from dsprune.consolidate import check_files, find_checkpoint, read_manifest
from dsprune.errors import CheckpointError, ConfigError
from tests.helpers.runs import assert_same, checkpoints, execute, words
from tests.helpers.world import run_to_the_end, run_world

pytestmark = pytest.mark.dist


@pytest.fixture
def run(undisturbed, tmp_path):
    """A run with checkpoints of steps 4 and 6, the stage itself not yet called finished."""
    folder = Path(shutil.copytree(undisturbed(), tmp_path / "run"))
    (folder / "prune" / "done.json").unlink()
    return folder


def _newest(run):
    return run / "prune" / "checkpoints" / "step-00000006"


def _goes_back(place, run, undisturbed, name):
    """The run goes back to the older checkpoint, says which file is why, and ends as it would have."""
    ending = run_to_the_end(execute, 2, *words(place, run))
    assert ending.codes == [0, 0], ending.log
    assert "damaged checkpoint, going back to the one before" in ending.log
    assert name in ending.log
    assert "going on from step 4" in ending.log
    assert checkpoints(run) == ["damaged-step-00000006", "step-00000004", "step-00000006"]
    assert_same(run, undisturbed())


CUTS = {"truncated": lambda data: data[:-100], "empty": lambda data: b"", "halved": lambda data: data[: len(data) // 2]}


@pytest.mark.parametrize("how", ["truncated", *(pytest.param(h, marks=pytest.mark.faults) for h in ("empty", "gone"))])
def test_f07_a_shard_is_not_whole(place, undisturbed, run, how):
    path = next((_newest(run) / "student").glob("*rank_1*optim_states.pt"))
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(CUTS[how](path.read_bytes()))
    _goes_back(place, run, undisturbed, path.name)


def test_f07_every_file_that_is_cut_or_gone_is_noticed(run):
    checkpoint = _newest(run)
    names = [*read_manifest(checkpoint)["files"], "MANIFEST.json"]
    for name in names:
        path = checkpoint / name
        data = path.read_bytes()
        for how in (*CUTS.values(), None):
            if how is None:
                path.unlink()
            else:
                path.write_bytes(how(data))
            with pytest.raises(CheckpointError):
                check_files(checkpoint, read_manifest(checkpoint), hashes=True)
            path.write_bytes(data)
    check_files(checkpoint, read_manifest(checkpoint), hashes=True)
    print(f"truncations and removals: {4 * len(names)} injected, all detected")


def test_f07_no_checkpoint_is_whole(place, run):
    for path in (run / "prune" / "checkpoints").iterdir():
        next((path / "student").glob("*model_states.pt")).write_bytes(b"")
    ending = run_to_the_end(execute, 2, *words(place, run))
    assert ending.codes == [74, 74]
    assert "no checkpoint in" in ending.log
    assert ending.log.count("model_states.pt has 0 bytes") >= 2, "both are named, with what is wrong"
    assert checkpoints(run) == ["step-00000004", "step-00000006"], "nothing is moved or removed"


def test_f08_every_flipped_byte_is_noticed(run):
    """Twenty places in every file, the manifest included."""
    rng = random.Random(8)
    checkpoint, flips = _newest(run), 0
    for name in [*read_manifest(checkpoint)["files"], "MANIFEST.json"]:
        path = checkpoint / name
        data = path.read_bytes()
        for _ in range(20):
            at = rng.randrange(len(data))
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
            with pytest.raises(CheckpointError):
                check_files(checkpoint, read_manifest(checkpoint), hashes=True)
            flips += 1
        path.write_bytes(data)
    check_files(checkpoint, read_manifest(checkpoint), hashes=True)
    print(f"flipped bytes: {flips} injected, all detected")


@pytest.mark.parametrize(
    "name",
    [
        "replica.safetensors",
        *(pytest.param(n, marks=pytest.mark.faults) for n in ("optim_states.pt", "model_states.pt", "state.json")),
    ],
)
def test_f08_a_flipped_bit_is_noticed_before_use(place, undisturbed, run, name):
    path = next(path for path in _newest(run).rglob(f"*{name}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    _goes_back(place, run, undisturbed, path.name)


@pytest.mark.parametrize("what", ["gone", pytest.param("empty", marks=pytest.mark.faults)])
def test_f09_manifest(place, undisturbed, run, what):
    path = _newest(run) / "MANIFEST.json"
    path.unlink()
    if what == "empty":
        path.touch()
    _goes_back(place, run, undisturbed, "MANIFEST.json")


def test_f09_stray_directories_and_files(place, undisturbed, run):
    folder = run / "prune" / "checkpoints"
    shutil.rmtree(folder / "step-00000006")
    shutil.copytree(folder / "step-00000004", folder / "step-00000005.tmp")
    shutil.copytree(folder / "step-00000004", folder / "step-00000002.trash")
    (folder / "step-00000004").rename(folder / "step-00000004.old")
    (folder / "step-00000004.old" / "student" / "zero_pp_rank_7_mp_rank_00_model_states.pt").write_bytes(b"stale")
    ending = run_to_the_end(execute, 2, *words(place, run))
    assert ending.codes == [0, 0], ending.log
    assert "a save of step-00000005 was cut off and is discarded" in ending.log
    assert "going on from step 4" in ending.log
    assert checkpoints(run) == ["step-00000004", "step-00000006"]
    assert_same(run, undisturbed())


def test_f09_consolidation_ignores_what_is_no_checkpoint(run):
    folder = run / "prune" / "checkpoints"
    shutil.copytree(folder / "step-00000006", folder / "step-00000008.tmp")
    assert find_checkpoint(run).name == "step-00000006"


@pytest.mark.parametrize("policy", ["must", "never"])
def test_resume_policies(place, run, tmp_path, policy):
    fresh = tmp_path / "fresh"
    if policy == "must":
        ending = run_to_the_end(execute, 2, *words(place, fresh), "checkpoint.resume=must")
        assert ending.codes == [74, 74]
        assert "holds no checkpoint" in ending.log
    else:
        ending = run_to_the_end(execute, 2, *words(place, run), "checkpoint.resume=never")
        assert ending.codes == [73, 73]
        assert "holds checkpoints" in ending.log


def test_f25_drift(place, undisturbed, run):
    shutil.rmtree(_newest(run))
    changed = ("prune.lr=1e-5", "distill.layers=0.5", "seed=7")
    ending = run_to_the_end(execute, 2, *words(place, run), *changed)
    assert ending.codes == [64, 64]
    for key in ("prune.lr was 2e-05", "distill.layers was 0.9", "seed was 42"):
        assert key in ending.log
    allowed = 'checkpoint.allow_drift=["prune.lr", "distill", "seed", "examples"]'
    assert run_world(execute, 2, *words(place, run), *changed, allowed) == [0, 0]


def test_f25_what_is_a_difference():
    from dsprune.engine.checkpoints.resume import check_drift

    theirs = {"prune": {"lr": 1e-4, "clip": 1.0}, "examples": "ab"}
    check_drift(theirs, theirs, (), Path("x"))
    check_drift(theirs, {**theirs, "prune": {"lr": 2.0, "clip": 1.0}}, ("prune.lr",), Path("x"))
    check_drift(theirs, {**theirs, "prune": {"lr": 2.0}}, ("prune",), Path("x"))
    with pytest.raises(ConfigError, match="examples was 'ab'") as caught:
        check_drift(theirs, {"prune": {"lr": 2.0, "clip": 1.0}, "examples": "cd"}, ("prune.l",), Path("x"))
    assert len(caught.value.mistakes) == 2


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def _load_evil(trap, checkpoint):
    """Plant a shard that runs code when it is unpickled, and load it past the hashes."""
    from dsprune.engine.zero.shard_files import only_weights
    from tests.helpers.settings import ROWS
    from tests.helpers.training import Setup, build_trainer

    trainer = build_trainer(Setup(ROWS[0], stage=2))
    trainer.engine.save_checkpoint(str(checkpoint), tag="student", save_latest=False)
    if trainer.world.is_main:
        for path in (checkpoint / "student").glob("*.pt"):
            torch.save({**torch.load(path, weights_only=False), "evil": _Evil(trap)}, path)
    trainer.world.gather(None)
    with pytest.raises(Exception, match=r"weights_only|Weights only") as caught, only_weights(trainer.engine):
        trainer.engine.load_checkpoint(str(checkpoint), tag="student")
    untouched = not trap.exists()
    trainer.world.gather(None)
    torch.load(next((checkpoint / "student").glob("*.pt")), weights_only=False)
    return untouched, trap.exists(), str(caught.value)[:80]


def test_f28_malicious_pickle_in_a_shard(tmp_path):
    for untouched, works, _ in run_world(_load_evil, 2, tmp_path / "trap", tmp_path / "checkpoint"):
        assert untouched, "the pickle was executed"
        assert works, "the trap itself must work"


def test_f28_malicious_pickle_as_teacher(place, tmp_path):
    trap = tmp_path / "trap"
    teacher = Path(shutil.copytree(place / "teacher", tmp_path / "teacher"))
    (teacher / "model.safetensors").unlink()
    torch.save({"evil": _Evil(trap)}, teacher / "pytorch_model.bin")
    ending = run_to_the_end(execute, 1, *words(place, tmp_path / "run"), f"teacher.path={teacher}")
    assert ending.codes == [64], ending.log
    assert "safetensors" in ending.log
    assert not trap.exists()
    torch.load(teacher / "pytorch_model.bin", weights_only=False)
    assert trap.exists(), "the trap itself must work"


def test_f31_a_checkpoint_of_another_format(run):
    path = _newest(run) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 1, "dsprune": "0.0.9"}))
    with pytest.raises(
        CheckpointError, match=r"of format 1, written by dsprune 0.0.9, and this version reads format 2"
    ):
        read_manifest(_newest(run))
