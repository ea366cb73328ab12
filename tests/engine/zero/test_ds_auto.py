""" "auto" is filled in as Hugging Face's Trainer does, what has nothing to decide is said, and both train."""

import copy
import json

import numpy as np
import pytest
import torch

from dsprune.config import BatchConfig
from dsprune.engine.zero.check import find
from dsprune.engine.zero.config import (
    check_ds_config,
    fill_widths,
    load_ds_config,
    plan_batch,
    precision,
    student_config,
    teacher_config,
    zero_stage,
)
from dsprune.engine.zero.operators import build_operators
from dsprune.errors import ConfigError
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, trajectory
from tests.helpers.world import run_world

COMMON = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
PUBLISHED = {
    "zero2": {
        **COMMON,
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
            "round_robin_gradients": True,
        },
    },
    "zero3": {
        **COMMON,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
}
"""What Hugging Face's documentation of ZeRO-2 and ZeRO-3 gives as examples."""
PLAN = plan_batch(BatchConfig(size=32, micro=4), 2)


def _filled(content, hidden_size=384):
    return fill_widths(student_config(check_ds_config(content, "ds.json"), PLAN, clip=0.5), hidden_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_auto_becomes_what_the_trainer_makes_of_it(name):
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    filled = _filled(PUBLISHED[name])
    assert "auto" not in json.dumps(filled)
    trainer = HfTrainerDeepSpeedConfig(copy.deepcopy(PUBLISHED[name]))
    arguments = TrainingArguments(
        output_dir="unused",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_grad_norm=0.5,
        use_cpu=True,
    )
    arguments.__class__ = type("TwoRanks", (TrainingArguments,), {"world_size": 2})
    trainer.trainer_config_process(arguments)
    model = torch.nn.Module()
    model.config = type("Config", (), {"hidden_size": 384})
    trainer.trainer_config_finalize(arguments, model, num_training_steps=100)
    for key, value in filled.items():
        assert key in trainer.config, key
        theirs = trainer.config[key]
        for inner, ours in value.items() if isinstance(value, dict) else [(None, value)]:
            assert (theirs if inner is None else theirs[inner]) == ours, (key, inner)


def test_what_auto_became_is_said():
    notes = "\n".join(_filled(PUBLISHED["zero3"]).notes)
    for told in (
        "train_batch_size 32",
        "gradient_clipping 0.5",
        "bf16.enabled false (recipes ask for no precision: for it, write true)",
        "optimizer and scheduler what the recipe says",
        "reduce_bucket_size 147456, stage3_prefetch_bucket_size 132710, stage3_param_persistence_threshold 3840",
        "stage3_gather_16bit_weights_on_model_save: dsprune exports whole weights in any case",
        'steps_per_print: DeepSpeed prints it where log_level is "info"',
    ):
        assert told in notes
    assert _filled({"zero_optimization": {"stage": 2}}).notes == ()


def test_half_precision_is_asked_for_by_true_alone():
    for value, expected in ((True, "bf16"), (False, "fp32"), ("auto", "fp32")):
        config = check_ds_config({"zero_optimization": {"stage": 2}, "bf16": {"enabled": value}}, "ds.json")
        assert precision(config) == precision(config.given) == expected
        assert config["bf16"]["enabled"] is (expected == "bf16")


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_half_precision_at_stage_0_is_refused_for_a_student_and_taken_for_a_teacher(kind, monkeypatch):
    monkeypatch.setattr("dsprune.engine.zero.config._check_device", lambda config: None)
    config = check_ds_config({kind: {"enabled": True}}, "ds.json")
    with pytest.raises(ConfigError, match=f"ds.json: {kind} at ZeRO stage 0: .* use stage 1"):
        student_config(config, PLAN, clip=1.0)
    assert precision(teacher_config(config, 2)) == kind


def test_keys_that_have_nothing_to_decide_are_said():
    zero = {"stage": 2, "sub_group_size": 7, "stage3_max_live_parameters": 7, "offload_optimizer": {"buffer_count": 5}}
    notes = _filled({"zero_optimization": zero, "aio": {"queue_depth": 4}, "vocabulary_size": 7}).notes
    assert notes == (
        "ds.json: vocabulary_size: DeepSpeed reads it for a warning alone",
        "ds.json: not used at ZeRO stage 2 with this offloading: zero_optimization.sub_group_size, "
        "zero_optimization.stage3_max_live_parameters, zero_optimization.offload_optimizer.buffer_count, "
        "aio.queue_depth",
    )


def test_a_teacher_keeps_what_only_runs_forward():
    config = teacher_config(check_ds_config(PUBLISHED["zero3"], "ds.json"), 2)
    assert set(config) == {
        "zero_optimization", "fp16", "bf16", "steps_per_print", "train_micro_batch_size_per_gpu", "train_batch_size"
    }  # fmt: skip
    assert find(config, "zero_optimization.offload_optimizer") is None
    assert find(config, "zero_optimization.offload_param.device") == "cpu"
    assert config["train_batch_size"] == 2
    assert any("a teacher has no gradients" in note for note in config.notes)


def _trajectories(setups):
    return [trajectory(setup) for setup in setups]


@pytest.mark.dist
def test_published_configurations_train_unchanged(tmp_path):
    setups = []
    for name, content in PUBLISHED.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        config = load_ds_config(str(path))
        build_operators(config, say=print)  # once, before both ranks want it
        setups.append(Setup(ROWS[1], stage=zero_stage(config), accumulation=2, ds=config.given))
    reference = run_world(trajectory, 1, Setup(ROWS[1]))[0]
    for results in run_world(_trajectories, 2, setups):
        for result in results:
            for ours, theirs in zip(result["losses"], reference["losses"], strict=True):
                assert ours["total"] == pytest.approx(theirs["total"], rel=2e-5)
            for key, value in reference["state"].items():
                np.testing.assert_allclose(result["state"][key], value, rtol=2e-5, atol=1e-4, err_msg=key)
