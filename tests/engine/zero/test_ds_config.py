import json

import pytest

from dsprune.config import BatchConfig
from dsprune.engine.zero.config import (
    list_ds_configs,
    load_ds_config,
    plan_batch,
    precision,
    student_config,
    teacher_config,
    zero_stage,
)
from dsprune.engine.zero.requirements import check_deepspeed_version
from dsprune.errors import ConfigError


@pytest.mark.parametrize("name", list_ds_configs())
def test_shipped_configurations_are_what_their_names_say(name):
    config = load_ds_config(name)
    for stage in range(4):
        if f"zero{stage}" in name:
            assert zero_stage(config) == stage
    for kind in ("bf16", "fp16"):
        assert (precision(config) == kind) == (kind in name)
    device = config["zero_optimization"].get("offload_optimizer", {}).get("device")
    assert device == {"zero3_offload": "cpu", "zero3_nvme": "nvme"}.get(name)


def test_batches_multiply_out():
    plan = plan_batch(BatchConfig(size=32, micro=4), 2)
    assert (plan.micro, plan.accumulation) == (4, 4)
    assert plan_batch(BatchConfig(size=32), 4).micro == 8
    for batch, ranks in ((BatchConfig(size=32, micro=5), 2), (BatchConfig(size=8), 16), (BatchConfig(size=9), 2)):
        with pytest.raises(ConfigError, match="does not divide"):
            plan_batch(batch, ranks)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'"),
        ({"gradient_clippping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"stge": 3}}, r"unknown key 'zero_optimization\.stge': did you mean 'stage'"),
        ({"zero_optimization": {"stage": 7}}, r"'zero_optimization\.stage'"),
        ({"optimizer": {"type": "Adam"}}, "dsprune builds AdamW itself"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one"),
    ],
)
def test_a_wrong_key_is_told(tmp_path, config, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load_ds_config(str(path))


def test_what_the_recipe_decides_is_filled_in_or_must_agree():
    plan = plan_batch(BatchConfig(size=32, micro=4), 2)
    filled = student_config({"gradient_accumulation_steps": "auto"}, plan, clip=1.0)
    assert filled["train_batch_size"] == 32
    assert filled["gradient_accumulation_steps"] == 4
    assert filled["gradient_clipping"] == 1.0
    with pytest.raises(ConfigError, match="train_batch_size = 64, the recipe"):
        student_config({"train_batch_size": 64}, plan, clip=1.0)


def test_a_teacher_is_whole_or_sharded():
    for stage in (1, 2):
        with pytest.raises(ConfigError, match=r"use stage 0 .* or 3"):
            teacher_config({"zero_optimization": {"stage": stage}}, 2)


def test_a_missing_configuration_names_those_that_there_are():
    with pytest.raises(ConfigError, match="zero3_offload"):
        load_ds_config("zero5")


@pytest.mark.parametrize("version", ["0.17.6", "0.19.5"])
def test_versions_with_wrong_gradients_are_refused(version):
    with pytest.raises(ConfigError, match=f"DeepSpeed {version} computes wrong gradients"):
        check_deepspeed_version(version)


def test_versions_that_were_tried_are_accepted():
    for version in ("0.19.6", "0.19.8"):
        check_deepspeed_version(version)


def _nvme(path):
    return {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(path)}}}


def test_offload_to_nvme_says_what_is_missing(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    plan = plan_batch(BatchConfig(size=8), 1)
    with pytest.raises(ConfigError, match="nvme_path '/nowhere' is not a folder that can be written"):
        student_config(_nvme("/nowhere"), plan, clip=1.0)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(ConfigError, match="libaio is missing"):
        teacher_config(_nvme(tmp_path), 1)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    assert student_config(_nvme(tmp_path), plan, clip=1.0)["train_batch_size"] == 8
