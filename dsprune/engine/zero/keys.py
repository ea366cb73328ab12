"""Every key that DeepSpeed knows in its configuration, and what becomes of it here: honoured, said, or refused.

The table is written by hand and checked by machine: a test asks DeepSpeed's own models and parsers for the keys that
they read, and fails where one is missing here; another one trains with each honoured key. DeepSpeed itself passes over
a key that it does not know, and over most that do not fit the rest of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from dsprune.dtypes import PRECISIONS, Precision

__all__ = ["ADAMW", "ALIASES", "KEYS", "RATE", "Entry", "Honoured", "Kind", "Refused", "Said", "Section", "refusal"]

ANY_STAGE = (0, 1, 2, 3)
SHARDED = (1, 2, 3)
"""ZeRO stages that shard something."""
FLAT = (1, 2)
"""ZeRO stages that keep gradients and masters in flat buffers."""
WEIGHTS = (3,)
"""The ZeRO stage that shards weights."""


@dataclass(frozen=True)
class Kind:
    """What JSON value a key takes.

    Attributes:
        described: for people.
        fits: whether a value is one.
    """

    described: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number of at least 0", lambda value: _is_number(value) and value >= 0 and value == int(value))
WHOLE = Kind("a whole number", lambda value: _is_number(value) and value == int(value))
NUMBER = Kind("a number", _is_number)
TEXT = Kind("a string", _is_text)
TEXTS = Kind("a list of strings", _is_texts)
PATTERNS = Kind('"auto" or a list of strings', lambda value: value == "auto" or _is_texts(value))


def _one_of(*choices: str, said: str = "") -> Kind:
    described = f"one of {', '.join(choices)}" + (f" ({said})" if said else "")
    return Kind(described, lambda value: _is_text(value) and value.lower() in choices)


def _auto_or(value: Any, setter: str) -> Kind:
    """Nothing but "auto", or the one value that dsprune trains with."""
    described = '"auto"' if value is None else f'"auto" or {value}'
    return Kind(f"{described} ({setter})", lambda given: given == "auto" or (value is not None and given == value))


ADAMW = "dsprune builds AdamW itself: set lr and weight_decay in the recipe"
RATE = "dsprune sets the learning rate itself: set schedule and warmup in the recipe"
DTYPE = _one_of(*PRECISIONS)
STAGE = Kind("0, 1, 2 or 3", lambda value: not isinstance(value, bool) and value in ANY_STAGE)
DEVICE = _one_of("none", "cpu", "nvme")


@dataclass(frozen=True)
class Honoured:
    """A key that is handed on, and does what DeepSpeed says.

    Attributes:
        kind: of its value.
        stages: ZeRO stages at which it does anything; elsewhere that is said.
        training: it concerns gradients, the optimizer or checkpoints, of which a teacher has none.
        auto: Hugging Face's Trainer fills in "auto", and so does dsprune.
    """

    kind: Kind
    stages: tuple[int, ...] = ANY_STAGE
    training: bool = False
    auto: bool = False


@dataclass(frozen=True)
class Said:
    """A key that may be given and has nothing to decide here, which is said: `why`."""

    why: str
    kind: Kind = SWITCH


@dataclass(frozen=True)
class Refused:
    """A key, or a section with all that is in it, that is not taken.

    Attributes:
        why: the reason, and what to use instead.
        harmless: values that ask for nothing, which are let pass and taken out.
    """

    why: str
    harmless: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Section:
    """A key that holds an object of keys of its own."""


Entry = Honoured | Said | Refused | Section

_OFF: tuple[Any, ...] = (False, {"enabled": False}, {})


def _removed(instead: str) -> Refused:
    return Refused(f"DeepSpeed has removed it: {instead}")


TOP: dict[str, Entry] = {
    "train_batch_size": Honoured(COUNT, training=True, auto=True),
    "train_micro_batch_size_per_gpu": Honoured(COUNT, training=True, auto=True),
    "gradient_accumulation_steps": Honoured(COUNT, training=True, auto=True),
    "gradient_clipping": Honoured(NUMBER, training=True, auto=True),
    "communication_data_type": Honoured(_one_of(*get_args(Precision)), training=True),
    "steps_per_print": Honoured(COUNT, training=True, auto=True),
    "wall_clock_breakdown": Honoured(SWITCH, training=True),
    "memory_breakdown": Honoured(SWITCH),
    "dump_state": Honoured(SWITCH),
    "log_level": Honoured(_one_of("debug", "info", "warning", "error", "critical")),
    "disable_python_gc": Honoured(SWITCH),
    "zero_allow_untested_optimizer": Said("AdamW, which dsprune builds, is one that DeepSpeed has tested"),
    "zero_force_ds_cpu_optimizer": Said(
        "where ZeRO offloads the optimizer, dsprune builds DeepSpeed's CPU Adam anyway"
    ),
    "vocabulary_size": Said("DeepSpeed reads it for a warning alone", COUNT),
    "seed": Refused("DeepSpeed does not read it: set seed in the recipe"),
    "managed_gradient_accumulation": Refused("dsprune leaves the accumulation to DeepSpeed: leave it out", (True,)),
    "gradient_allreduce_op": Refused('gradients are averaged over ranks: leave it out, or write "mean"', ("mean",)),
    "prescale_gradients": Refused(
        "where ZeRO shards gradients DeepSpeed passes over it or stops at it: leave it out", (False,)
    ),
    "gradient_predivide_factor": Refused(
        "where ZeRO shards gradients DeepSpeed passes over it, stops at it, or averages wrongly: leave it out", (1,)
    ),
    "seq_parallel_communication_data_type": Refused("dsprune cuts no sequences over ranks: leave it out"),
    "sequence_parallel_size": Refused("dsprune cuts no sequences over ranks: leave it out", (1,)),
    "data_parallel_size": Refused("all ranks share the data: leave it out"),
    "use_data_before_expert_parallelism": Refused("dsprune has no expert parallelism: leave it out", (False,)),
    "dataloader_drop_last": Refused("dsprune draws the batches itself, all of one size: leave it out", (False,)),
    "disable_allgather": Refused("DeepSpeed no longer reads it: leave it out", (False,)),
    "amp": _removed("use bf16 or fp16"),
    "nebula": _removed("checkpoints are set in the recipe, under checkpoint"),
    "datastates_ckpt": Refused("dsprune commits checkpoints itself: leave it out", (False,)),
    "sparse_gradients": _removed("leave it out"),
    "compression_training": _removed("to quantise, take the exported model to a tool for that"),
    "quantize_training": _removed("to quantise, take the exported model to a tool for that"),
    "eigenvalue": _removed("leave it out"),
    "sparse_attention": _removed("the attention is the model's own: leave it out"),
    "elasticity": _removed("dsprune goes on with any number of ranks by itself (checkpoint.reshard)"),
    "graph_harvesting": _removed("leave it out"),
    "curriculum_learning": _removed("the order of the examples is drawn from the recipe's seed"),
    "progressive_layer_drop": _removed("to drop layers, prune them: shape.layers"),
    "data_efficiency": Refused("dsprune draws the batches itself: leave it out", _OFF),
    "activation_checkpointing": Refused(
        "it sets up DeepSpeed's own checkpointing, which no model here calls: set student.activation_checkpointing "
        "in the recipe",
        ({},),
    ),
    "autotuning": Refused("it belongs to DeepSpeed's launcher: `dsprune plan` forecasts memory", _OFF),
    "compile": Refused("nothing is compiled: leave it out", ({}, {"deepcompile": False})),
    "hybrid_engine": Refused("it serves generation while training, which no stage does: leave it out", _OFF),
    "pipeline": Refused("dsprune has no pipeline parallelism: use ZeRO stage 3", ({},)),
    "tensor_parallel": Refused(
        "a gate's unit must not be cut over ranks: use ZeRO stage 3", ({}, {"autotp_size": 0}, {"autotp_size": 1})
    ),
    "expert_parallel": Refused("dsprune has no expert parallelism: leave it out", _OFF),
    "weight_quantization": Refused("quantised weights cannot be pruned: take the exported model to a tool for that"),
    "wandb": Refused("set log.wandb = true in the recipe instead", _OFF),
    "comet": Refused("use log.wandb or log.tensorboard in the recipe, or csv_monitor here", _OFF),
}

BF16: dict[str, Entry] = {
    "enabled": Honoured(SWITCH, auto=True),
    "check_grad_overflow": Honoured(SWITCH, FLAT, training=True),
    "immediate_grad_update": Honoured(SWITCH, (1,), training=True),
    "bf16_master_weights_and_grads": Refused(
        "masters in bf16 lose what a small learning rate adds: leave it out", (False,)
    ),
    "bf16_optimizer_states": Refused("masters in bf16 lose what a small learning rate adds: leave it out", (False,)),
}

FP16: dict[str, Entry] = {
    "enabled": Honoured(SWITCH, auto=True),
    "loss_scale": Honoured(NUMBER, training=True),
    "initial_scale_power": Honoured(COUNT, training=True),
    "loss_scale_window": Honoured(COUNT, training=True),
    "hysteresis": Honoured(COUNT, training=True),
    "consecutive_hysteresis": Honoured(SWITCH, training=True),
    "min_loss_scale": Honoured(COUNT, training=True),
    "auto_cast": Refused("it would round the gates, which are fp32 on every rank: leave it out", (False,)),
    "fp16_master_weights_and_grads": Refused(
        "masters in fp16 lose what a small learning rate adds: leave it out", (False,)
    ),
}

DATA_TYPES: dict[str, Entry] = {
    "grad_accum_dtype": Honoured(DTYPE, SHARDED, training=True),
    "param_dtype": Honoured(DTYPE),
    "buffer_dtype": Honoured(DTYPE),
    "keep_in_fp32_modules": Honoured(PATTERNS),
}

_NVME_BUFFERS: dict[str, Entry] = {"nvme_path": Honoured(TEXT, WEIGHTS), "buffer_count": Honoured(COUNT, WEIGHTS)}

OFFLOAD_PARAM: dict[str, Entry] = {
    "device": Honoured(DEVICE, WEIGHTS),
    "pin_memory": Honoured(SWITCH, WEIGHTS),
    **_NVME_BUFFERS,
    "buffer_size": Honoured(COUNT, WEIGHTS),
    "max_in_cpu": Honoured(COUNT, WEIGHTS),
}

OFFLOAD_OPTIMIZER: dict[str, Entry] = {
    "device": Honoured(DEVICE, SHARDED, training=True),
    "pin_memory": Honoured(SWITCH, SHARDED, training=True),
    **{key: Honoured(entry.kind, WEIGHTS, training=True) for key, entry in _NVME_BUFFERS.items()},  # type: ignore[union-attr]
    "pipeline_read": Honoured(SWITCH, WEIGHTS, training=True),
    "pipeline_write": Honoured(SWITCH, WEIGHTS, training=True),
    "fast_init": Honoured(SWITCH, WEIGHTS, training=True),
    "ratio": Refused("what stays on the device keeps its first learning rate: leave it out", (1,)),
    "super_offload": Refused("it has not been tried with dsprune: offload to the CPU without it", (False,)),
    "cpuadam_cores_perc": Refused("it belongs to super_offload, which has not been tried with dsprune: leave it out"),
}

_LEAVES = (
    "a leaf module gives weights that a pass does not reach gradients of zero, and scores reach none: leave it out"
)
_QUANTISED = "ZeRO++ trains with rounded weights or gradients, and has not been tried with dsprune: leave it out"

ZERO: dict[str, Entry] = {
    "stage": Honoured(STAGE),
    "contiguous_gradients": Honoured(SWITCH, SHARDED, training=True),
    "reduce_scatter": Honoured(SWITCH, SHARDED, training=True),
    "reduce_bucket_size": Honoured(COUNT, SHARDED, training=True, auto=True),
    "use_multi_rank_bucket_allreduce": Honoured(SWITCH, FLAT, training=True),
    "allgather_partitions": Refused("DeepSpeed no longer reads it, and always gathers: leave it out", (True,)),
    "allgather_bucket_size": Honoured(COUNT, FLAT, training=True),
    "overlap_comm": Honoured(SWITCH, SHARDED),
    "compute_grad_norm": Refused("the guard against numbers that are not finite reads the norm: leave it out", (True,)),
    "load_from_fp32_weights": Refused("a resumed run is the run that was never stopped: leave it out", (True,)),
    "elastic_checkpoint": Refused(
        "dsprune goes on with any number of ranks by itself (checkpoint.reshard): leave it out", (False,)
    ),
    "round_robin_gradients": Honoured(SWITCH, FLAT, training=True),
    "parameter_alignment": Honoured(SWITCH, FLAT, training=True),
    "ignore_unused_parameters": Refused(
        "a projection that no layer learns through has no gradient, and the run would stop at it: leave it out", (True,)
    ),
    "sub_group_size": Honoured(COUNT, WEIGHTS, training=True),
    "stage3_prefetch_bucket_size": Honoured(COUNT, WEIGHTS, auto=True),
    "stage3_param_persistence_threshold": Honoured(COUNT, WEIGHTS, auto=True),
    "stage3_model_persistence_threshold": Honoured(COUNT, WEIGHTS),
    "stage3_max_live_parameters": Honoured(COUNT, WEIGHTS),
    "stage3_max_reuse_distance": Honoured(COUNT, WEIGHTS),
    "stage3_use_all_reduce_for_fetch_params": Honoured(SWITCH, WEIGHTS),
    "stage3_allgather_sequential": Honoured(SWITCH, WEIGHTS),
    "stage3_gather_16bit_weights_on_model_save": Said("dsprune exports whole weights in any case"),
    "stage3_gather_fp16_weights_on_model_save": Said("dsprune exports whole weights in any case"),
    "stage3_module_granularity_threshold": Refused(_LEAVES, (0,)),
    "leaf_module": Refused(_LEAVES, ({},)),
    "memory_efficient_linear": Honoured(SWITCH, WEIGHTS),
    "override_module_apply": Refused("fresh weights are initialised through it: leave it out", (True,)),
    "pipeline_loading_checkpoint": Refused("the ranks load together: leave it out", (False,)),
    "log_trace_cache_warnings": Honoured(SWITCH, WEIGHTS),
    "enable_sanity_checks": Honoured(SWITCH, WEIGHTS),
    "zero_hpz_partition_size": Refused("it has not been tried with dsprune: leave it out", (1,)),
    "zero_quantized_weights": Refused(_QUANTISED, (False,)),
    "zero_quantized_nontrainable_weights": Refused(_QUANTISED, (False,)),
    "zero_quantized_gradients": Refused(_QUANTISED, (False,)),
    "zenflow": Refused("it lets weights lag behind their gradients: offload_optimizer without it"),
    "legacy_stage1": _removed("use stage 1"),
    "save_muon_momentum_buffer_in_memory": Refused("dsprune builds AdamW: leave it out", (False,)),
    "mics_shard_size": _removed("leave it out"),
    "mics_hierarchical_params_gather": _removed("leave it out"),
    "zeropp_loco_param": _removed("leave it out"),
    "cpu_offload": Refused('write "offload_optimizer": {"device": "cpu"}', (False,)),
    "cpu_offload_param": Refused('write "offload_param": {"device": "cpu"}', (False,)),
    "cpu_offload_use_pin_memory": Refused("write pin_memory in offload_optimizer or offload_param", (False,)),
}

_MONITOR: dict[str, Entry] = {
    "enabled": Honoured(SWITCH, training=True),
    "output_path": Honoured(TEXT, training=True),
    "job_name": Honoured(TEXT, training=True),
}

SECTIONS: dict[str, dict[str, Entry]] = {
    "zero_optimization": ZERO,
    "zero_optimization.offload_param": OFFLOAD_PARAM,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER,
    "bf16": BF16,
    "fp16": FP16,
    "data_types": DATA_TYPES,
    "aio": {
        "block_size": Honoured(COUNT, WEIGHTS),
        "queue_depth": Honoured(COUNT, WEIGHTS),
        "intra_op_parallelism": Honoured(COUNT, WEIGHTS),
        "single_submit": Honoured(SWITCH, WEIGHTS),
        "overlap_events": Honoured(SWITCH, WEIGHTS),
        "use_gds": Refused("it has not been tried with dsprune: leave it out", (False,)),
    },
    "optimizer": {
        "type": Honoured(_one_of("adam", "adamw", said=ADAMW), training=True),
        "params": Section(),
        "legacy_fusion": Refused("dsprune builds torch's AdamW: leave it out", (False,)),
    },
    "optimizer.params": {
        "lr": Honoured(_auto_or(None, ADAMW), training=True, auto=True),
        "weight_decay": Honoured(_auto_or(None, ADAMW), training=True, auto=True),
        "betas": Honoured(_auto_or([0.9, 0.999], ADAMW), training=True, auto=True),
        "eps": Honoured(_auto_or(1e-8, ADAMW), training=True, auto=True),
        "torch_adam": Said("dsprune builds torch's AdamW, and DeepSpeed's on the CPU where ZeRO offloads it"),
        "adam_w_mode": Refused("dsprune builds AdamW: leave it out", (True,)),
    },
    "scheduler": {
        "type": Honoured(_one_of("warmuplr", "warmupdecaylr", said=RATE), training=True),
        "params": Section(),
    },
    "scheduler.params": {
        "warmup_min_lr": Honoured(_auto_or(0, RATE), training=True, auto=True),
        "warmup_max_lr": Honoured(_auto_or(None, RATE), training=True, auto=True),
        "warmup_num_steps": Honoured(_auto_or(None, RATE), training=True, auto=True),
        "total_num_steps": Honoured(_auto_or(None, RATE), training=True, auto=True),
        "warmup_type": Honoured(_one_of("linear", said=RATE), training=True),
    },
    "checkpoint": {
        "tag_validation": Honoured(_one_of("ignore", "warn", "fail"), training=True),
        "checkpoint_serialization": Refused("consolidation maps the files, which needs it: leave it out", (True,)),
        "load_universal": Refused("dsprune converts checkpoints itself (checkpoint.reshard): leave it out", (False,)),
        "use_node_local_storage": Refused("all ranks must see one run folder: put it on shared storage", (False,)),
        "writer": Refused("dsprune commits checkpoints itself: leave it out"),
        "parallel_write": Refused("it belongs to pipeline parallelism: leave it out", ({}, {"pipeline_stage": False})),
    },
    "flops_profiler": {
        "enabled": Honoured(SWITCH, training=True),
        "recompute_fwd_factor": Honoured(NUMBER, training=True),
        "profile_step": Honoured(COUNT, training=True),
        "module_depth": Honoured(WHOLE, training=True),
        "top_modules": Honoured(COUNT, training=True),
        "detailed": Honoured(SWITCH, training=True),
        "output_file": Honoured(TEXT, training=True),
    },
    "torch_autocast": {
        "enabled": Honoured(SWITCH),
        "dtype": Honoured(TEXT),  # which, `check_autocast` says
        "lower_precision_safe_modules": Refused("torch's own choice of modules is cast: leave it out"),
    },
    "comms_logger": {
        "enabled": Honoured(SWITCH),
        "verbose": Honoured(SWITCH),
        "prof_all": Honoured(SWITCH),
        "debug": Honoured(SWITCH),
        "prof_ops": Honoured(TEXTS),
    },
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "timers": {"throughput": Section()},
    "timers.throughput": {
        "enabled": Honoured(SWITCH, training=True),
        "synchronized": Honoured(SWITCH, training=True),
    },
}


def _flat() -> dict[str, Entry]:
    keys = dict(TOP)
    for path, entries in SECTIONS.items():
        keys[path] = Section()
        keys |= {f"{path}.{key}": entry for key, entry in entries.items()}
    return keys


KEYS: dict[str, Entry] = _flat()
"""The table: dotted path to what becomes of it. What stands below a refused path is refused with it."""

ALIASES = {
    "bfloat16": "bf16",
    "zero_optimization.prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.model_persistence_threshold": "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.max_live_parameters": "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.max_reuse_distance": "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.use_all_reduce_for_fetch_params": "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.allgather_sequential": "zero_optimization.stage3_allgather_sequential",
    "zero_optimization.module_granularity_threshold": "zero_optimization.stage3_module_granularity_threshold",
    "zero_optimization.gather_16bit_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}
"""Second names that DeepSpeed takes, and the first ones."""


def refusal(path: str) -> Refused | None:
    """What refuses a path: its own entry, or that of a section that it stands in."""
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        entry = KEYS.get(".".join(parts[:length]))
        if isinstance(entry, Refused):
            return entry
    return None
