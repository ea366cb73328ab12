"""Shards of modules that no encoder has, but that DeepSpeed saves in ways of their own: frozen and tied weights,
buffers, groups, sizes that divide by nothing, masters of a precision of their own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsprune.consolidate.shards import open_shards
from dsprune.errors import CheckpointError
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen = nn.Embedding(11, 7)
        self.frozen.weight.requires_grad_(False)
        self.body = nn.Linear(7, 7)
        self.single = nn.Parameter(torch.ones(1))
        self.wide = nn.Linear(7, 13, bias=False)
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.body.weight
        self.register_buffer("kept", torch.arange(5.0))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tied(self.body(self.frozen(ids))) * self.single
        return self.wide(hidden).float().square().sum()


STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True}},
    "fp16, scale 8": {"fp16": {"enabled": True, "loss_scale": 8}},
}
CASES = [(stage, precision) for stage in STAGES for precision in PRECISIONS]


def _save_all(folder: Path) -> list[dict[str, Any]]:
    """Runs on every rank: one checkpoint for each case, and what the engine held."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed does not offer fp16 on most CPUs; the arithmetic works, and the files are those of a GPU.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    return [_save(folder / str(i), stage, PRECISIONS[precision]) for i, (stage, precision) in enumerate(CASES)]


def _save(folder: Path, stage: int, precision: dict[str, Any]) -> dict[str, Any]:
    import deepspeed

    model = Odd()
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in trained if param.dim() == 2], "weight_decay": 0.1},
        {"params": [param for param in trained if param.dim() == 1], "weight_decay": 0.0},
    ]
    # Several groups of a few values each, as a large model has of many.
    sharded = {"sub_group_size": 40, "stage3_param_persistence_threshold": 0} if stage == 3 else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **sharded},
        **precision,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config)
    for _ in range(2):
        engine.backward(engine(torch.tensor([[1, 2, 3]])))
        engine.step()
    engine.save_checkpoint(str(folder), tag="student", save_latest=False)
    weights = {name: _whole(param) for name, param in engine.module.named_parameters(remove_duplicate=False)}
    weights["kept"] = engine.module.kept
    return {name: tensor.detach().float().numpy().copy() for name, tensor in weights.items()}


def _whole(param: nn.Parameter) -> torch.Tensor:
    """The master of a live parameter by DeepSpeed's own gathering; the parameter itself where it has none."""
    import deepspeed

    master = deepspeed.utils.safe_get_full_fp32_param(param) if param.requires_grad else None
    if master is not None:
        return master
    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
        return param.detach().clone()


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda size: f"world {size}")
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, run_world(_save_all, request.param, folder)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case[0]} {case[1]}")
def test_every_tensor_is_what_the_engine_held(saved, case):
    folder, weights = saved[0] / str(CASES.index(case)), saved[1][CASES.index(case)]
    source = open_shards(folder / "student")
    assert set(weights) == set(source.names())
    for name, expected in weights.items():
        assert source.shape(name) == expected.shape, name
        assert torch.equal(source.read(name), torch.from_numpy(expected)), name


def test_half_precision_without_masters_is_told(saved, caplog):
    open_shards(saved[0] / str(CASES.index((0, "bf16"))) / "student")
    assert "without fp32 masters" in caplog.text


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_missing_optimizer_shards_are_told(saved, stage, tmp_path):
    folder = Path(shutil.copytree(saved[0] / str(CASES.index((stage, "bf16"))) / "student", tmp_path / "student"))
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no optimizer shards"):
        open_shards(folder)


def test_missing_model_states_are_told(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0] / str(CASES.index((3, "fp32"))) / "student", tmp_path / "student"))
    sorted(folder.glob("*model_states.pt"))[-1].unlink()
    with pytest.raises(CheckpointError, match="model states"):
        open_shards(folder)


def test_a_layout_that_does_not_add_up_is_told(saved, tmp_path):
    """A parameter that the shards do not have room for, or a shard that has more than its parameters."""
    folder = Path(shutil.copytree(saved[0] / str(CASES.index((3, "fp32"))) / "student", tmp_path / "student"))
    path = min(folder.glob("*model_states.pt"))
    states = torch.load(path, weights_only=True)
    group = next(shapes for shapes in states["param_shapes"] if "wide.weight" in shapes)
    rows, columns = group["wide.weight"]
    for wrong in (rows + 3, rows - 3):
        group["wide.weight"] = torch.Size([wrong, columns])
        torch.save(states, path)
        with pytest.raises(CheckpointError, match="shard"):
            open_shards(folder)
