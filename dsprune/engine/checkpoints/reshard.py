"""Loading a checkpoint into an engine of another shape: other ranks, another ZeRO stage, another precision.

Every rank reads, mapped from the shards of all ranks that saved, those values of the fp32 masters and of
Adam's two moments that its own partition holds. No value is computed, so what was saved is what goes on,
bit for bit; what follows differs from the old shape by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsprune.consolidate import ShardedTensors, open_moments, open_shards
from dsprune.engine.zero.gather import gathered
from dsprune.errors import CheckpointError

__all__ = ["load_resharded"]

Sources = Mapping[str, ShardedTensors]
"""Masters under `weights`, and each of Adam's moments under its name."""


def load_resharded(engine: Any, folder: Path, saved: Mapping[str, Any]) -> None:
    """Fill a fresh engine from the shards of another. Collective under ZeRO: all ranks must call.

    Args:
        engine: of the same model, with an optimizer of Adam's family that has not stepped yet.
        folder: what DeepSpeed saved for one tag.
        saved: `engine` of the checkpoint's state: counters, loss scale, order of the optimizer's parameters.

    Raises:
        CheckpointError: the shards are of another model, or this kind of engine cannot be filled.
    """
    moments, steps = open_moments(folder, saved["groups"])
    sources = {"weights": open_shards(folder), **moments}
    _check_names(engine, sources["weights"])
    fill = _filler(engine)
    fill(engine, sources, steps)
    _fill_frozen(engine, sources["weights"])
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            if name in sources["weights"]:
                buffer.copy_(sources["weights"].read(name))
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, saved[counter])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name, value in saved["loss_scaler"].items():
        if hasattr(scaler, name) and engine.fp16_enabled():
            setattr(scaler, name, value)


def _filler(engine: Any) -> Callable[[Any, Sources, float], None]:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3 and not optimizer.swap_optimizer:
        return _fill_stage3
    if stage in (1, 2) and hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _fill_stage12
    if stage == 0 and isinstance(optimizer, torch.optim.Optimizer):
        return _fill_whole
    raise CheckpointError(
        f"a checkpoint cannot be converted for an engine of ZeRO stage {stage} with {type(optimizer).__name__}: launch "
        "it as it was saved"
    )


def _check_names(engine: Any, weights: ShardedTensors) -> None:
    for name, param in engine.module.named_parameters():
        shape = tuple(getattr(param, "ds_shape", param.shape))
        if name not in weights or weights.shape(name) != shape:
            raise CheckpointError(f"{weights.source} is of another model: it holds no '{name}' of shape {shape}")


def _fill_frozen(engine: Any, weights: ShardedTensors) -> None:
    """What does not train and so has no master. Collective under ZeRO-3."""
    frozen = {name: param for name, param in engine.module.named_parameters() if not param.requires_grad}
    for name, param in frozen.items():
        with torch.no_grad(), gathered(param, rewritten=True) as writes:
            if writes:
                param.data.copy_(weights.read(name))


def _steps(optimizer: Any, steps: float, like: Tensor) -> Any:
    """How an optimizer counts its steps: DeepSpeed's CPU Adam as an int, torch's as a tensor beside the moments."""
    if isinstance(optimizer, torch.optim.AdamW):
        return torch.tensor(steps, dtype=torch.float32, device=like.device)
    return int(steps)


def _fill_whole(engine: Any, sources: Sources, steps: float) -> None:
    """Stage 0: every rank holds everything."""
    names = {param: name for name, param in engine.module.named_parameters()}
    for group in engine.optimizer.param_groups:
        for param in group["params"]:
            name = names[param]
            param.data.copy_(sources["weights"].read(name))
            moments = {
                key: source.read(name).to(param.device, copy=True)
                for key, source in sources.items()
                if key != "weights"
            }
            engine.optimizer.state[param] = {"step": _steps(engine.optimizer, steps, param), **moments}


def _fill_stage12(engine: Any, sources: Sources, steps: float) -> None:
    """Stages 1 and 2: a rank's partition of a group is one flat vector, of which a parameter owns a range.

    Where the parameters lie is read from the groups as they were flattened: DeepSpeed's own addresses of fragments
    are wrong where round_robin_gradients shuffles them.
    """
    optimizer = engine.optimizer
    names = {param: name for name, param in engine.module.named_parameters()}
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        filled = {key: torch.zeros_like(flat.data) for key in sources}
        begin = torch.distributed.get_rank(optimizer.real_dp_process_group[group]) * flat.numel()
        params, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
        for param, offset in zip(params, offsets, strict=True):
            first, last = max(offset, begin), min(offset + param.numel(), begin + flat.numel())
            if first < last:
                for key, tensors in sources.items():
                    values = tensors.read_flat(names[param], first - offset, last - first)
                    filled[key][first - begin : last - begin] = values
        flat.data.copy_(filled.pop("weights"))
        optimizer.optimizer.state[flat] = {"step": _steps(optimizer.optimizer, steps, flat), **filled}
    optimizer.update_lp_params()


def _fill_stage3(engine: Any, sources: Sources, steps: float) -> None:
    """Stage 3: a rank's flat vector holds its equal share of every parameter, one after the other."""
    optimizer = engine.optimizer
    names = {param: name for name, param in engine.module.named_parameters()}
    optimizer.checkpoint_event_prologue()
    for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        filled = {key: _shares(params, names, tensors, flat) for key, tensors in sources.items()}
        flat.data.copy_(filled.pop("weights"))
        optimizer.optimizer.state[flat] = {"step": _steps(optimizer.optimizer, steps, flat), **filled}
    _refresh_partitions(optimizer)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()


def _shares(params: list[nn.Parameter], names: Mapping[Any, str], tensors: ShardedTensors, like: Tensor) -> Tensor:
    """This rank's shares of some parameters, one after the other: as `like`."""
    rank = torch.distributed.get_rank()
    share = torch.zeros_like(like.data)
    offset = 0
    for param in params:
        numel = param.ds_tensor.ds_numel  # type: ignore[attr-defined]
        share[offset : offset + numel] = tensors.read_flat(names[param], rank * numel, numel)
        offset += numel
    return share


def _refresh_partitions(optimizer: Any) -> None:
    """What the forward pass reads, from the masters; as DeepSpeed does after loading its own files."""
    for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        flat = optimizer.fp16_partitioned_groups_flat[group]
        flat.data.copy_(master.data)
        pieces = optimizer.unflatten(flat, optimizer.fp16_partitioned_groups[group])
        for partition, piece in zip(optimizer.fp16_partitioned_groups[group], pieces, strict=True):
            partition.data = piece.data
