import shutil
from pathlib import Path

import pytest
import torch

from dsprune.consolidate import open_checkpoint
from dsprune.consolidate.shards import open_shards
from dsprune.errors import CheckpointError
from tests.helpers.checkpoints import save_run
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup

pytestmark = pytest.mark.dist
CASES = [(0, "", 1), (1, "", 2), (2, "", 2), (3, "", 1), (3, "", 2), (2, "bf16", 2), (3, "bf16", 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"zero{c[0]}{c[1]} x{c[2]}")
def saved(request, tmp_path_factory):
    stage, precision, world_size = request.param
    folder = tmp_path_factory.mktemp("run")
    weights = save_run(Setup(ROWS[0], stage=stage, precision=precision), world_size, folder)
    return folder / "prune" / "checkpoints" / "step-00000003", weights


def test_every_tensor_is_the_live_models_master(saved):
    checkpoint, weights = saved
    source = open_checkpoint(checkpoint)
    assert set(source.names()) == set(weights)
    for name, expected in weights.items():
        assert source.shape(name) == tuple(expected.shape)
        assert torch.equal(source.read(name), expected), name


def test_reading_needs_no_deepspeed(saved, monkeypatch):
    import builtins

    checkpoint, weights = saved
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "deepspeed":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    source = open_checkpoint(checkpoint)
    assert all(source.read(name).shape == tensor.shape for name, tensor in weights.items())


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    save_run(Setup(ROWS[0], stage=3), 2, folder)
    return folder / "prune" / "checkpoints" / "step-00000003" / "student"


@pytest.fixture
def student(zero3, tmp_path):
    return Path(shutil.copytree(zero3, tmp_path / "student"))


def test_a_missing_rank_is_told(student):
    (student / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="written by 2 ranks and holds the shards of 1"):
        open_shards(student)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_truncated_shard_is_told(student, keep):
    path = student / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"rank_0.*cannot be read"):
        open_shards(student)


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model states"):
        open_shards(tmp_path)


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_code_is_refused_and_not_run(student, tmp_path):
    trap = tmp_path / "ran"
    path = student / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {}, "evil": _Evil(trap)}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_shards(student)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap itself must work"
