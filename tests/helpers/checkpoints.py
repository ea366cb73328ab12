"""Real checkpoints of tiny models, saved by real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.models import tiny_batch
from tests.helpers.training import Setup, build_trainer
from tests.helpers.world import run_world


def _save(setup: Setup, folder: Path) -> dict[str, Any]:
    from dsprune.engine.checkpoint import CheckpointStore, Snapshot, save_verification_batch

    trainer = build_trainer(setup)
    for step in range(3):
        trainer.step(step)
    model = trainer.engine.module.model

    def describe(path: Path) -> None:
        (path / "model").mkdir()
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        (path / "model" / "config.json").write_text(json.dumps(config))
        save_verification_batch(path / "verify.safetensors", tiny_batch())
        trainer.replica.method.select().save(path / "selection.safetensors")

    store = CheckpointStore(folder / "prune" / "checkpoints", "prune", trainer.world, keep=2, method=setup.row.name)
    store.save(trainer.engine, Snapshot(3, {"metrics": {}}, {}, None, describe), trainer.replica)
    return _live_weights(trainer.engine)


def _live_weights(engine: Any) -> dict[str, Any]:
    """fp32 masters of a live engine, by DeepSpeed's own gathering."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, param in engine.module.named_parameters():
        master = safe_get_full_fp32_param(param)
        whole[name] = (param.detach() if master is None else master).float().cpu().numpy().copy()
    return whole


def save_run(setup: Setup, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    """A run folder with one committed checkpoint of the prune stage; returns the live model's fp32 weights."""
    weights = run_world(_save, world_size, setup, folder)[0]
    return {name: torch.from_numpy(value) for name, value in weights.items()}
