"""Every honoured key of a ds_config, set in turn on two ranks, trains what ZeRO stage 0 trains in fp32, and resumes.

Slow; a few of the keys are tried by default.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsprune.engine.zero.check import leaves
from dsprune.engine.zero.keys import KEYS, Honoured
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, build_trainer
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist
GRAIN = replace(next(row for row in ROWS if row.name == "grain"), steps=5)
SAVED = 3
"""Step at which a run is saved; it goes on astray and is then restored."""


@dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        content: of a ds_config, besides its stage and precision.
        precision: in which it is tried.
        stages: where; by default wherever all its keys do anything.
    """

    content: dict[str, Any]
    precision: str = "fp32"
    stages: tuple[int, ...] = (0, 1, 2, 3)

    @property
    def keys(self) -> list[str]:
        return [path for path, _ in leaves(self.content)]

    def runs_at(self, stage: int) -> bool:
        reads = [entry.stages for key in self.keys if isinstance(entry := KEYS[key], Honoured)]
        return stage in self.stages and all(stage in stages for stages in reads) and (stage > 0 or not self.is_half)

    @property
    def is_half(self) -> bool:
        return self.precision != "fp32"

    def __str__(self) -> str:
        return f"{', '.join(self.keys) or 'nothing'} in {self.precision}"

    def file(self, stage: int) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 100  # else all of a tiny model stays whole
        base = {"zero_optimization": zero} | ({self.precision: {"enabled": True}} if self.is_half else {})
        return _merged(base, self.content)


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        merged[key] = _merged(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def _zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


OFFLOAD = {"device": "cpu"}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ALL_AUTO = {
    "optimizer": {
        "type": "AdamW",
        "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_type": "linear",
            **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        },
    },
}
CASES = [
    Case({}),
    Case(_zero(contiguous_gradients=False)),
    Case(_zero(reduce_scatter=False)),
    Case(_zero(reduce_bucket_size=500.0)),
    Case(_zero(use_multi_rank_bucket_allreduce=False)),
    Case(_zero(allgather_bucket_size=500)),
    Case(_zero(overlap_comm=True), stages=(1, 2)),
    Case(_zero(overlap_comm=False), stages=(3,)),
    Case(_zero(round_robin_gradients=True)),
    Case(_zero(parameter_alignment=True)),
    Case(_zero(sub_group_size=1000)),
    Case(_zero(stage3_prefetch_bucket_size=0)),
    Case(_zero(stage3_param_persistence_threshold=0)),
    Case(_zero(stage3_model_persistence_threshold=0)),
    Case(_zero(stage3_max_live_parameters=0)),
    Case(_zero(stage3_max_reuse_distance=0)),
    Case(_zero(stage3_use_all_reduce_for_fetch_params=True)),
    Case(_zero(stage3_allgather_sequential=True)),
    Case(_zero(memory_efficient_linear=False)),
    Case(_zero(log_trace_cache_warnings=True)),
    Case(_zero(enable_sanity_checks=True)),
    Case(_zero(offload_optimizer=OFFLOAD)),
    Case(_zero(offload_optimizer={**OFFLOAD, "pin_memory": False})),
    Case(_zero(offload_param=OFFLOAD)),
    Case(_zero(offload_param={**OFFLOAD, "pin_memory": False}, offload_optimizer=OFFLOAD)),
    Case({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}),
    Case({"gradient_clipping": 1}),
    Case(ALL_AUTO),
    Case({"disable_python_gc": True}),
    Case({"wall_clock_breakdown": True}),
    Case({"memory_breakdown": True}, stages=(2,)),  # collects garbage before and after every pass
    Case({"timers": {"throughput": {"enabled": True, "synchronized": False}}}),
    Case({"checkpoint": {"tag_validation": "Fail"}}),
    Case({"tensorboard": {"enabled": True, "output_path": "board", "job_name": "job"}}),
    Case({"csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "job"}}),
    Case(
        {
            "flops_profiler": {
                "enabled": True,
                "profile_step": 1,
                "recompute_fwd_factor": 1.0,
                "module_depth": 1,
                "top_modules": 2,
                "detailed": False,
                "output_file": "flops.txt",
            }
        }
    ),
    Case({}, "bf16"),
    Case({"communication_data_type": "fp32"}, "bf16"),
    Case({"communication_data_type": "bf16"}, "bf16"),
    Case({"bf16": {"check_grad_overflow": False}}, "bf16"),
    Case(FP32_SUMS, "bf16"),
    Case({**FP32_SUMS, "bf16": {"immediate_grad_update": True}}, "bf16"),
    Case({"data_types": {"param_dtype": "bf16", "buffer_dtype": "bf16"}}, "bf16"),
    Case({"data_types": {"keep_in_fp32_modules": ["position*"]}}, "bf16"),
    Case(_zero(offload_optimizer=OFFLOAD), "bf16"),
    Case({}, "fp16"),
    Case({"fp16": {"loss_scale": 128}}, "fp16"),
    Case({"fp16": {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}}, "fp16"),
    Case({"fp16": {"consecutive_hysteresis": True, "min_loss_scale": 2}}, "fp16"),
    # These two stay switched on for all that comes after them in a process.
    Case({"log_level": "info", "dump_state": True, "steps_per_print": 1}),
    Case(
        {
            "log_level": "info",
            "comms_logger": {
                "enabled": True,
                "verbose": True,
                "prof_all": False,
                "debug": True,
                "prof_ops": ["all_reduce"],
            },
        }
    ),
]
QUICK = [
    Case(_zero(reduce_scatter=False, round_robin_gradients=True, parameter_alignment=True), stages=(2,)),
    Case(_zero(overlap_comm=True, reduce_bucket_size=500, allgather_bucket_size=500), stages=(1,)),
    Case(_zero(stage3_param_persistence_threshold=0, sub_group_size=1000, overlap_comm=False), stages=(3,)),
    Case({**FP32_SUMS, "communication_data_type": "fp32"}, "bf16", stages=(1, 3)),
    Case({"fp16": {"initial_scale_power": 8, "loss_scale_window": 2}}, "fp16", stages=(2,)),
]
"""Tried by default."""
NVME = Case(
    {
        "aio": {
            "block_size": 262144,
            "queue_depth": 4,
            "intra_op_parallelism": 2,
            "single_submit": True,
            "overlap_events": False,
        },
        "zero_optimization": {
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": ".",
                "buffer_count": 5,
                "pipeline_read": True,
                "pipeline_write": True,
                "fast_init": True,
            },
            "offload_param": {
                "device": "nvme",
                "nvme_path": ".",
                "buffer_count": 6,
                "buffer_size": 1_000_000,
                "max_in_cpu": 0,
            },
        },
    },
    stages=(3,),
)
TOLERANCES = {  # relative, of losses and of gradient norms; absolute, of weights: on average, and of any
    "fp32": (2e-5, 1e-5, 1e-6, 1e-4),
    "bf16": (2e-2, 5e-2, 5e-4, 1e-2),
    "fp16": (1e-3, 2e-3, 5e-5, 1e-2),
}


@dataclass
class Trained:
    """What a run gave: losses and gradient norms of every step, and the weights after the last."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)


def _note_norms(engine: Any, norms: list[float]) -> None:
    """At stage 0 the engine tells no norm; Adam and clipping would hide gradients that are too large or too small."""
    clip = engine.clip_fp32_gradients

    def clip_and_note() -> None:
        gradients = [param.grad for param in engine.module.parameters() if param.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        clip()

    engine.clip_fp32_gradients = clip_and_note


def _step(trainer: Any, step: int, trained: Trained) -> None:
    trained.losses.append(trainer.step(step).losses["total"])
    if trainer.engine.zero_optimization_stage() > 0:
        trained.norms.append(float(trainer.engine.get_global_grad_norm()))


def _train(setup: Setup, folder: Path | None) -> Trained:
    """Train; with a folder, go on from a checkpoint in between, and see that the last one holds the live weights."""
    from dsprune.consolidate import open_shards
    from dsprune.engine.checkpoints.resume import restore
    from dsprune.engine.checkpoints.store import TAG, CheckpointStore, Snapshot
    from dsprune.engine.zero.gather import release, whole

    trainer, trained = build_trainer(setup), Trained()
    if setup.stage == 0:
        _note_norms(trainer.engine, trained.norms)
    store = CheckpointStore(folder, "prune", trainer.world, keep=2, method=setup.row.name) if folder else None

    def save(step: int) -> Path:
        assert store is not None
        return store.save(trainer.engine, Snapshot(step, {}, {}, None, lambda path: None, {}), trainer.replica)

    for step in range(trainer.total_steps):
        if step == SAVED and store is not None:
            saved = save(step)
            _step(trainer, step, Trained([], [], {}))
            restore(saved, store, trainer.engine, trainer.replica, reshard=False, say=print)
            del trained.norms[SAVED:]
        _step(trainer, step, trained)
    module = trainer.engine.module
    live = {name: whole(module, name).cpu() for name, _ in module.named_parameters()}
    if store is None:
        trained.weights = {name: weight.numpy() for name, weight in live.items()}
    else:
        shards = open_shards(save(trainer.total_steps) / TAG)
        trained.weights = {name: shards.read(name).detach().numpy().copy() for name in live}
        for name, weight in live.items():
            rounded = shards.read(name).detach().to(module.get_parameter(name).dtype).float()
            assert torch.equal(rounded, weight), f"{name} is saved as another weight"
    release(trainer.engine, trainer.teacher.engine)
    return trained


def _sweep(cases: list[tuple[int, Case]], folder: Path) -> list[Trained]:
    """Train every case at its stage. Runs on every rank."""
    from deepspeed.accelerator import get_accelerator

    import dsprune.engine.zero.config

    # DeepSpeed does not offer fp16 on most CPUs; the arithmetic works, and so does its loss scaling.
    dsprune.engine.zero.config._check_device = lambda config: None
    type(get_accelerator()).is_fp16_supported = lambda self: True
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    found = []
    for i, (stage, case) in enumerate(cases):
        print(f"case {case} at stage {stage}", flush=True)
        found.append(_train(Setup(GRAIN, stage=stage, accumulation=2, ds=case.file(stage)), folder / str(i)))
    return found


@cache
def _reference() -> Trained:
    return run_world(_train, 2, Setup(GRAIN, stage=0, accumulation=2), None)[0]  # type: ignore[no-any-return]


def _differences(ours: Trained, theirs: Trained) -> tuple[float, float, float, float]:
    """Of losses and norms, relative; of weights, absolute: on average, and the largest."""
    losses = max(abs(a / b - 1) for a, b in zip(ours.losses, theirs.losses, strict=True))
    norms = max(abs(a / b - 1) for a, b in zip(ours.norms, theirs.norms, strict=True))
    assert ours.weights.keys() == theirs.weights.keys()
    apart = [np.abs(ours.weights[name] - theirs.weights[name]) for name in theirs.weights]
    mean = float(np.concatenate([a.ravel() for a in apart]).mean())
    return losses, norms, mean, max(float(a.max()) for a in apart)


def _assert_one_training(cases: list[tuple[int, Case]], folder: Path) -> None:
    results = run_world(_sweep, 2, cases, folder, timeout=500)[0]
    print("\nlargest difference to ZeRO stage 0 in fp32: of losses, gradient norms, weights (mean, largest)")
    wrong = []
    for (stage, case), trained in zip(cases, results, strict=True):
        found = _differences(trained, _reference())
        print(f"  ZeRO {stage}: {case}: " + "  ".join(f"{value:.1e}" for value in found))
        if any(value > bound for value, bound in zip(found, TOLERANCES[case.precision], strict=True)):
            wrong.append(f"{case} at stage {stage}: {found}")
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_honoured_key_trains_one_model(tmp_path, stage):
    _assert_one_training([(stage, case) for case in CASES if case.runs_at(stage)], tmp_path / "sweep")
    for written in ("flops.txt", "csv/job/Train_Samples_lr.csv", "board/job"):
        assert (tmp_path / "sweep" / written).exists()


def test_some_honoured_keys_train_one_model(tmp_path):
    quick = [(stage, case) for stage in range(4) for case in QUICK if case.runs_at(stage)]
    _assert_one_training(quick, tmp_path / "sweep")


@pytest.mark.slow
def test_offloading_to_nvme_trains_one_model(tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is not installed")
    _assert_one_training([(3, NVME)], tmp_path / "sweep")


def test_every_honoured_key_is_swept():
    # Autocast is another arithmetic: test_trajectory.py holds it to fp32.
    enabling = {"zero_optimization.stage", "bf16.enabled", "fp16.enabled"}
    enabling |= {"torch_autocast.enabled", "torch_autocast.dtype"}
    swept = {key for case in (*CASES, NVME) for key in case.keys} | enabling
    assert swept == {path for path, entry in KEYS.items() if isinstance(entry, Honoured)}
    for case in (*CASES, *QUICK, NVME):
        assert any(map(case.runs_at, range(4))), case
