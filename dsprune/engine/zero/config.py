"""DeepSpeed configurations: read, checked to the last key, and filled in from the recipe.

DeepSpeed passes over a misspelt top-level key without a word and then runs at ZeRO stage 0; it takes "auto" for a
value, and leaves most keys that do not fit the rest of the file unread. Here every key is known (`ds_keys`), and what
the recipe decides (batch, clipping, optimizer, schedule) is filled in, as Hugging Face's Trainer does, or must agree.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from dsprune.config import BatchConfig
from dsprune.dtypes import Precision
from dsprune.engine.zero.check import (
    AUTO,
    OFFLOADED,
    dtype_of,
    find,
    find_mistakes,
    find_notes,
    leaves,
    normal_form,
    precision,
    zero_stage,
)
from dsprune.engine.zero.keys import KEYS, Honoured
from dsprune.engine.zero.requirements import quiet_import
from dsprune.errors import ConfigError

__all__ = [
    "OFFLOADED",
    "BatchPlan",
    "DsConfig",
    "calibration_config",
    "check_student",
    "dtype_of",
    "fill_widths",
    "list_ds_configs",
    "load_ds_config",
    "offload_device",
    "plan_batch",
    "precision",
    "student_config",
    "teacher_config",
    "with_clip",
    "zero_stage",
]

WIDTH_KEYS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys of zero_optimization that Hugging Face's Trainer fills in from the width of the model."""


class DsConfig(dict[str, Any]):
    """A checked DeepSpeed configuration: what of a file DeepSpeed is given.

    Attributes:
        source: the file.
        given: what the file says.
        notes: what is to be said of it, a line each.
    """

    def __init__(
        self, content: Mapping[str, Any], source: str, given: Mapping[str, Any], notes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(content)
        self.source = source
        self.given = given
        self.notes = notes

    def changed(self, *notes: str, **keys: Any) -> DsConfig:
        """The same with other values at top-level keys, and more to say."""
        return DsConfig({**self, **keys}, self.source, self.given, (*self.notes, *notes))


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


def load_ds_config(name: str) -> DsConfig:
    """Read a DeepSpeed configuration by name (in ds_configs/) or path and check every key.

    Raises:
        ConfigError: not there, not JSON, an unknown key, a key that is not taken, or a value that DeepSpeed refuses.
    """
    path = Path(name) if name.endswith(".json") else _folder() / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except FileNotFoundError as error:
        raise ConfigError(
            f"no DeepSpeed configuration '{name}': give a path to a .json file, or one of "
            f"{', '.join(list_ds_configs())}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read DeepSpeed configuration {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object")
    return check_ds_config(content, str(path))


def check_ds_config(content: Mapping[str, Any], source: str) -> DsConfig:
    """What `load_ds_config` makes of the content of a file.

    Raises:
        ConfigError: with all mistakes together.
    """
    mistakes = find_mistakes(content)
    if mistakes:
        raise ConfigError(*(f"{source}: {mistake}" for mistake in mistakes))
    return DsConfig(normal_form(content), source, content)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key stand twice, and readers take the last one."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"'{twice[0]}' stands twice in one object: leave one out")
    return dict(pairs)


def offload_device(config: Mapping[str, Any], part: str) -> str:
    """Where one of `OFFLOADED` stands in a configuration: "none", "cpu" or "nvme"."""
    return str(find(config, f"zero_optimization.{part}.device", "none"))


def engine_precision(engine: Any) -> Precision:
    """Arithmetic that a live engine uses."""
    if engine.fp16_enabled():
        return "fp16"
    return "bf16" if engine.bfloat16_enabled() else "fp32"


def _as_given(config: Mapping[str, Any]) -> DsConfig:
    """A configuration with its file, if it came from one."""
    return config if isinstance(config, DsConfig) else check_ds_config(config, "the DeepSpeed configuration")


def student_config(config: Mapping[str, Any], batch: BatchPlan, *, clip: float) -> DsConfig:
    """A checked configuration with the recipe's batch and clipping filled in.

    What depends on the width of the model stays "auto" until `fill_widths`.

    Raises:
        ConfigError: the file contradicts the recipe, half precision at ZeRO stage 0, or fp16 where the device has none.
    """
    checked = _as_given(config)
    check_student(checked)
    _check_device(checked)
    recipe = {
        "train_batch_size": (batch.size, "batch.size"),
        "train_micro_batch_size_per_gpu": (batch.micro, "batch.micro"),
        "gradient_accumulation_steps": (batch.accumulation, "batch.size / (ranks x batch.micro)"),
        "gradient_clipping": (clip, "clip"),
    }
    mistakes = [
        f"{checked.source}: the DeepSpeed configuration says {key} = {checked[key]}, the recipe ({where}) says {value}"
        for key, (value, where) in recipe.items()
        if checked.get(key, AUTO) not in (AUTO, value)
    ]
    if mistakes:
        raise ConfigError(*mistakes)
    filled = {key: value for key, (value, _) in recipe.items()}
    return checked.changed(
        *_told(checked.source, find_notes(checked.given, teacher=False)),
        *_became(checked, filled),
        **{"steps_per_print": 10**9} | checked | filled,
    )


def with_clip(config: DsConfig, clip: float) -> DsConfig:
    """A student's configuration for a stage with another clipping."""
    return config.changed(gradient_clipping=clip)


def teacher_config(config: Mapping[str, Any], world_size: int) -> DsConfig:
    """A checked configuration for an engine that only runs forward.

    Raises:
        ConfigError: ZeRO stage 1 or 2, which shard what a teacher does not have.
    """
    checked = _as_given(config)
    check_teacher_stage(checked)
    _check_device(checked)
    forward = DsConfig(_without_training(checked), checked.source, checked.given, checked.notes)
    return forward.changed(
        *_told(checked.source, find_notes(checked.given, teacher=True)),
        steps_per_print=10**9,
        train_micro_batch_size_per_gpu=1,
        train_batch_size=world_size,
    )


def calibration_config(config: DsConfig) -> DsConfig:
    """A filled student's configuration for an engine whose weights do not train.

    ZeRO stages 1 and 2 shard what is not there then, and are stage 0; stage 3 shards the weights as it does in
    training.
    """
    forward = DsConfig(_without_training(config), config.source, config.given, config.notes)
    stage = 3 if _shards(config) else 0
    return forward.changed(
        zero_optimization={**forward.get("zero_optimization", {}), "stage": stage},
        steps_per_print=10**9,
        train_micro_batch_size_per_gpu=1,
        train_batch_size=config["train_batch_size"]
        // (config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]),
    )


def _without_training(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration without what concerns gradients, the optimizer or checkpoints."""
    kept = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        entry = KEYS.get(path)
        if isinstance(entry, Honoured) and entry.training:
            continue
        inside = _without_training(value, f"{path}.") if isinstance(value, Mapping) else value
        if not isinstance(value, Mapping) or inside or not value:
            kept[key] = inside
    return kept


def _told(source: str, notes: list[str]) -> list[str]:
    return [f"{source}: {note}" for note in notes]


def _became(config: DsConfig, filled: Mapping[str, Any]) -> list[str]:
    """One line about every "auto" that is settled without the model."""
    settled = []
    for path, value in leaves(config.given):
        if value != AUTO or path.rpartition(".")[2] in (*WIDTH_KEYS, "keep_in_fp32_modules"):
            continue
        if path in filled:
            settled.append(f"{path} {filled[path]}")
        elif path.endswith(".enabled"):
            settled.append(f"{path} false (recipes ask for no precision: for it, write true)")
    blocks = [block for block in ("optimizer", "scheduler") if block in config.given]
    if blocks:
        settled.append(f"{' and '.join(blocks)} what the recipe says (AdamW, lr, weight_decay, warmup, schedule)")
    return [f"{config.source}: auto: {', '.join(settled)}"] if settled else []


def fill_widths(config: DsConfig, hidden_size: int) -> DsConfig:
    """A configuration with what Hugging Face's Trainer takes from the width of the model, where it is "auto".

    Args:
        config: student's or teacher's.
        hidden_size: of the dense model.
    """
    zero = config.get("zero_optimization", {})
    rule = dict(zip(WIDTH_KEYS, (hidden_size**2, int(0.9 * hidden_size**2), 10 * hidden_size), strict=True))
    # As the Trainer does: below stage 3 the others stay at DeepSpeed's defaults, which nothing reads there.
    settled = {
        key: rule[key] for key in WIDTH_KEYS if zero.get(key) == AUTO and (key == WIDTH_KEYS[0] or _shards(config))
    }
    if not any(zero.get(key) == AUTO for key in WIDTH_KEYS):
        return config
    kept = {key: value for key, value in zero.items() if value != AUTO}
    told = ", ".join(f"{key} {value}" for key, value in settled.items())
    notes = [f"{config.source}: auto: {told} (hidden size {hidden_size})"] if settled else []
    return config.changed(*notes, zero_optimization={**kept, **settled})


def _shards(config: Mapping[str, Any]) -> bool:
    return zero_stage(config) == 3


def check_student(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that no student can be trained with.

    Raises:
        ConfigError: half precision at ZeRO stage 0, where DeepSpeed's optimizer takes a step on gradients of zero
            before the first one, and keeps no fp32 masters that consolidation could read.
    """
    kind = precision(config)
    if kind != "fp32" and zero_stage(config) == 0:
        source = getattr(config, "source", "deepspeed.student")
        raise ConfigError(
            f"{source}: {kind} at ZeRO stage 0: DeepSpeed's optimizer there counts a step before the first one, and "
            "trains another model than at stages 1 to 3: use stage 1, which on one rank keeps as much"
        )


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
