"""Real checkpoints of tiny models, saved by real ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dsprune.consolidate import FORMAT, render_manifest
from dsprune.structure import Selection
from tests.helpers.models import batch_for, tiny_batch
from tests.helpers.training import Setup, build_trainer
from tests.helpers.world import run_world


def _save(setup: Setup, folder: Path) -> dict[str, Any]:
    from dsprune.engine.checkpoints.store import CheckpointStore, Snapshot, save_verification_batch

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
    store.save(trainer.engine, Snapshot(3, {"metrics": {}}, {}, None, describe, {}), trainer.replica)
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


def write_run(
    folder: Path, model: PreTrainedModel, *, stage: str = "prune", selection: Selection | None = None
) -> Path:
    """A run folder as a stage-0 engine would leave it, without one: any model, any head, in milliseconds."""
    checkpoint = folder / stage / "checkpoints" / "step-00000001"
    (checkpoint / "student").mkdir(parents=True)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["projection.weight"] = torch.zeros(3, 3)
    states = {"module": state, "buffer_names": [], "optimizer": {"state": {}}, "param_shapes": None}
    torch.save(states, checkpoint / "student" / "mp_rank_00_model_states.pt")
    (checkpoint / "model").mkdir()
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    (checkpoint / "model" / "config.json").write_text(json.dumps(config))
    save_file(batch_for(model), checkpoint / "verify.safetensors")
    if selection is not None:
        selection.save(checkpoint / "selection.safetensors")
    write_manifest(checkpoint, stage)
    return folder


def write_manifest(checkpoint: Path, stage: str = "prune") -> None:
    """MANIFEST.json over whatever files lie in a checkpoint."""
    files = {
        str(path.relative_to(checkpoint)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "MANIFEST.json"
    }
    manifest = {"format": FORMAT, "stage": stage, "step": 1, "method": "cofi", "files": files}
    (checkpoint / "MANIFEST.json").write_text(render_manifest(manifest))
