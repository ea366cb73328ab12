"""DeepSpeed configurations: read, checked to the last key, and filled in from the recipe.

DeepSpeed ignores a misspelt top-level key without a word and then runs at ZeRO stage 0. Here every
key is known or refused, and what the recipe decides (batch, clipping) is filled in or must agree.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from dsprune.config import BatchConfig
from dsprune.engine.zero.requirements import quiet_import
from dsprune.errors import ConfigError

__all__ = [
    "OFFLOADED",
    "BatchPlan",
    "list_ds_configs",
    "load_ds_config",
    "offload_device",
    "plan_batch",
    "precision",
    "student_config",
    "zero_stage",
]

KNOWN_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    zero_optimization bf16 bfloat16 fp16 torch_autocast data_types communication_data_type
    prescale_gradients gradient_predivide_factor sparse_gradients steps_per_print wall_clock_breakdown
    memory_breakdown dump_state flops_profiler comms_logger activation_checkpointing aio checkpoint
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer disable_allgather disable_python_gc
    tensorboard wandb csv_monitor comet seed timers compile""".split()
)
OURS = {
    "optimizer": "dsprune builds AdamW itself: set lr and weight_decay in the recipe",
    "scheduler": "dsprune sets the learning rate itself: set schedule and warmup in the recipe",
    "amp": "apex amp does not work with ZeRO: use bf16 or fp16",
}
OFFLOADED = ("offload_optimizer", "offload_param")
"""What ZeRO can keep elsewhere than on the device."""
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's examples divide: size = world_size * micro * accumulation."""

    size: int
    micro: int
    accumulation: int
    world_size: int


def plan_batch(batch: BatchConfig, world_size: int) -> BatchPlan:
    """Divide the global batch over ranks and accumulation steps.

    Raises:
        ConfigError: it does not divide.
    """
    micro = batch.micro or batch.size // world_size
    accumulation, rest = divmod(batch.size, world_size * micro) if micro else (0, 1)
    if rest or not accumulation:
        raise ConfigError(
            f"batch.size = {batch.size} does not divide into {world_size} ranks x batch.micro = {micro}: "
            "make it a multiple"
        )
    return BatchPlan(batch.size, micro, accumulation, world_size)


def _folder() -> Path:
    """In a checkout they stand beside the package; a wheel puts them under the environment's share/."""
    checkout = Path(str(resources.files("dsprune"))).parent / "ds_configs"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "dsprune" / "ds_configs"


def list_ds_configs() -> list[str]:
    """Names of the configurations that ship with dsprune."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def load_ds_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration by name (in ds_configs/) or path and check every key.

    Raises:
        ConfigError: not there, not JSON, an unknown key, or a value that DeepSpeed refuses.
    """
    path = Path(name) if name.endswith(".json") else _folder() / f"{name}.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"no DeepSpeed configuration '{name}': give a path to a .json file, or one of "
            f"{', '.join(list_ds_configs())}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read DeepSpeed configuration {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object")
    mistakes = [*_top_level_mistakes(config), *_zero_mistakes(config), *_precision_mistakes(config)]
    if mistakes:
        raise ConfigError(*(f"{path}: {mistake}" for mistake in mistakes))
    return config


def _suggest(key: str, known: Mapping[str, Any] | frozenset[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f": did you mean '{near[0]}'?" if near else ""


def _top_level_mistakes(config: Mapping[str, Any]) -> list[str]:
    mistakes = []
    for key in config:
        if key in OURS:
            mistakes.append(f"'{key}': {OURS[key]}")
        elif key not in KNOWN_KEYS:
            mistakes.append(f"unknown key '{key}'{_suggest(key, KNOWN_KEYS)}")
    return mistakes


def _zero_mistakes(config: Mapping[str, Any]) -> list[str]:
    quiet_import()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    table = config.get("zero_optimization", {})
    if not isinstance(table, dict):
        return ["'zero_optimization' is not an object"]
    fields = DeepSpeedZeroConfig.model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    mistakes = [
        f"unknown key 'zero_optimization.{key}'{_suggest(key, frozenset(names))}" for key in table if key not in names
    ]
    if mistakes:
        return mistakes
    try:
        DeepSpeedZeroConfig(**table)
    except ValidationError as error:
        return [f"'zero_optimization.{'.'.join(map(str, e['loc']))}': {e['msg']}" for e in error.errors()]
    return []


def _precision_mistakes(config: Mapping[str, Any]) -> list[str]:
    enabled = [key for key in ("bf16", "bfloat16", "fp16") if dict(config.get(key, {})).get("enabled")]
    return [f"{' and '.join(enabled)} are both enabled: choose one"] if len(enabled) > 1 else []


def zero_stage(config: Mapping[str, Any]) -> int:
    """ZeRO stage of a checked configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offload_device(config: Mapping[str, Any], part: str) -> str:
    """Where one of `OFFLOADED` stands in a configuration: "none", "cpu" or "nvme"."""
    return str(config.get("zero_optimization", {}).get(part, {}).get("device", "none"))


def precision(config: Mapping[str, Any]) -> Precision:
    """Arithmetic that a checked configuration asks for."""
    if config.get("fp16", {}).get("enabled"):
        return "fp16"
    if config.get("bf16", config.get("bfloat16", {})).get("enabled"):
        return "bf16"
    return "fp32"


def engine_precision(engine: Any) -> Precision:
    """Arithmetic that a live engine uses."""
    if engine.fp16_enabled():
        return "fp16"
    return "bf16" if engine.bfloat16_enabled() else "fp32"


def _fill(config: Mapping[str, Any], key: str, value: Any, source: str) -> dict[str, Any]:
    given = config.get(key, "auto")
    if given not in ("auto", value):
        raise ConfigError(f"the DeepSpeed configuration says {key} = {given}, the recipe ({source}) says {value}")
    return {**config, key: value}


def student_config(config: Mapping[str, Any], batch: BatchPlan, *, clip: float) -> dict[str, Any]:
    """A checked configuration with the recipe's batch and clipping filled in.

    Raises:
        ConfigError: the file contradicts the recipe, or fp16 is asked for where the device has none.
    """
    _check_device(config)
    filled = _fill(config, "train_batch_size", batch.size, "batch.size")
    filled = _fill(filled, "train_micro_batch_size_per_gpu", batch.micro, "batch.micro")
    filled = _fill(filled, "gradient_accumulation_steps", batch.accumulation, "batch.size / (ranks x batch.micro)")
    filled = _fill(filled, "gradient_clipping", clip, "clip")
    return {"steps_per_print": 10**9, **filled}


def teacher_config(config: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """A checked configuration for an engine that only runs forward.

    Raises:
        ConfigError: ZeRO stage 1 or 2, which shard what a teacher does not have.
    """
    _check_device(config)
    check_teacher_stage(config)
    return {"steps_per_print": 10**9, **config, "train_micro_batch_size_per_gpu": 1, "train_batch_size": world_size}


def check_teacher_stage(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that shards what a teacher does not have.

    Raises:
        ConfigError: ZeRO stage 1 or 2.
    """
    if zero_stage(config) not in (0, 3):
        raise ConfigError(
            f"deepspeed.teacher: ZeRO stage {zero_stage(config)} shards optimizer state and gradients, and a teacher "
            "has neither: use stage 0 (whole on every rank) or 3 (sharded)"
        )


def _check_nvme(config: Mapping[str, Any]) -> None:
    """Offloading to NVMe needs a folder there, and DeepSpeed's asynchronous I/O."""
    zero = config.get("zero_optimization", {})
    paths = [zero[part].get("nvme_path") for part in OFFLOADED if offload_device(config, part) == "nvme"]
    if not paths:
        return
    for path in paths:
        if path is None or not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(
                f"offload to NVMe: nvme_path '{path}' is not a folder that can be written: name one on a local drive"
            )
    quiet_import()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "offload to NVMe: DeepSpeed cannot build its async_io op here, for which libaio is missing (Debian and "
            "Ubuntu: libaio-dev): install it, or offload to the CPU (zero3_offload)"
        )


def _check_device(config: Mapping[str, Any]) -> None:
    _check_nvme(config)
    if precision(config) == "fp16" and not torch.cuda.is_available():
        raise ConfigError("fp16 is enabled and this machine has no GPU: use bf16 or fp32 on CPU")
