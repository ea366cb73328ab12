"""Memory of an engine's states on one rank: what ZeRO keeps where, stage by stage.

Rajbhandari et al. 2020 (table 1) count parameters, gradients and optimizer state. DeepSpeed keeps more, and
that is counted here: weights below the persistence threshold whole on every rank, the bucket that gradients
wait in and the copy of it that is sent, a flat copy of the rank's gradients during the step, and the weights
that are gathered at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dsprune.engine.zero.config import precision, zero_stage

__all__ = ["States", "engine_states"]

BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements."""
MAX_LIVE = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`."""
PERSISTENCE = 100_000
"""DeepSpeed's default `stage3_param_persistence_threshold`."""
FP32 = 4
"""Bytes."""


@dataclass(frozen=True)
class States:
    """Bytes on one rank; the host's apart where they are offloaded.

    Attributes:
        parameters: weights as they compute, or this rank's share of them, and small ones that stay whole.
        gradients: as they are kept until the step.
        masters: fp32 copies of the weights.
        optimizer: Adam's two moments.
        bucket: where gradients wait to be reduced.
        reduction: a second bucket, which is what the reduction sends.
        gathered: sharded weights that are whole while they compute.
        step: a flat fp32 copy of this rank's gradients, during the step alone.
        host: what stands in the memory of the host instead.
        disk: what stands on NVMe instead.
    """

    parameters: float = 0.0
    gradients: float = 0.0
    masters: float = 0.0
    optimizer: float = 0.0
    bucket: float = 0.0
    reduction: float = 0.0
    gathered: float = 0.0
    step: float = 0.0
    host: float = 0.0
    disk: float = 0.0

    @property
    def resident(self) -> float:
        """What is there all the time."""
        return self.parameters + self.gradients + self.masters + self.optimizer + self.bucket


def engine_states(sizes: Sequence[int], ds_config: Mapping[str, Any], world_size: int, *, trained: bool) -> States:
    """States of an engine on one rank.

    Args:
        sizes: elements of each parameter of the model, tied ones once.
        ds_config: checked DeepSpeed configuration.
        world_size: number of ranks.
        trained: with gradients and optimizer, as for a student.
    """
    zero = ds_config.get("zero_optimization", {})
    stage, width = zero_stage(ds_config), FP32 if precision(ds_config) == "fp32" else 2
    total = sum(sizes)
    share = {level: total / world_size if stage >= level else float(total) for level in (1, 2, 3)}
    parameters, gathered = share[3] * width, 0.0
    if stage == 3:
        limit = int(zero.get("stage3_param_persistence_threshold", PERSISTENCE))
        persistent = sum(size for size in sizes if size <= limit)
        parameters += persistent * width
        live = int(zero.get("stage3_max_live_parameters", MAX_LIVE))
        gathered = min(total - persistent, max(live, max(sizes))) * width
    if not trained:
        return _offloaded(States(parameters=parameters, gathered=gathered), zero, share[3] * width)
    # At stage 0 there is nothing but torch's AdamW in fp32. At stages 1 and 2 the masters are copies in fp32, too;
    # stage 3 trains its shares of fp32 weights in place.
    in_place = width == FP32 and stage in (0, 3)
    bucket = min(int(zero.get("reduce_bucket_size", BUCKET)), total) * width if stage > 0 else 0.0
    states = States(
        parameters=parameters,
        gradients=share[2] * width,
        masters=0.0 if in_place else share[1] * FP32,
        optimizer=2 * share[1] * FP32,
        bucket=bucket,
        reduction=bucket,
        gathered=gathered,
        step=share[1] * FP32 if stage > 0 else 0.0,
    )
    return _offloaded(states, zero, share[3] * width)


def _offloaded(states: States, zero: Mapping[str, Any], shards: float) -> States:
    """What offloading moves to the host or to NVMe."""
    moved = {"cpu": 0.0, "nvme": 0.0}
    values = {field.name: getattr(states, field.name) for field in fields(states)}
    optimizer = zero.get("offload_optimizer", {}).get("device", "none")
    if optimizer in moved:
        parts = ("masters", "optimizer", "gradients", "step")
        moved[optimizer] += values["masters"] + values["optimizer"]
        moved["cpu"] += values["gradients"] + values["step"]
        values.update(dict.fromkeys(parts, 0.0))
    weights = zero.get("offload_param", {}).get("device", "none")
    if weights in moved:
        moved[weights] += shards
        values["parameters"] -= shards
    return States(**{**values, "host": moved["cpu"], "disk": moved["nvme"]})
