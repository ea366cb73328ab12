"""What DeepSpeed raises becomes one line that names file and section; what others raise stays theirs."""

import json

import pytest

from dsprune.engine.zero.config import DsConfig, check_ds_config, load_ds_config
from dsprune.engine.zero.refusals import refusals
from dsprune.errors import ConfigError, NumericsError
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, build_trainer
from tests.helpers.world import run_world


def _unchecked(content):
    """A configuration that no check has seen, as a future DeepSpeed might refuse one that all checks pass."""
    return DsConfig(content, "my.json", content)


def _read(content):
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig({"train_batch_size": 1, **content})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"zero_optimization": {"stage": 9}}, "my.json: 'zero_optimization.stage': Input should be 0, 1, 2"),
        ({"bf16": {"enabled": "perhaps"}}, "my.json: 'bf16.enabled': Input should be a valid boolean"),
        (
            {"communication_data_type": "bf32"},
            "my.json: 'communication_data_type': DeepSpeed refuses it: Invalid communication_data_type",
        ),
        (
            {"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}},
            "my.json: 'gradient_allreduce_op': DeepSpeed refuses it: gradient_allreduce_op='sum' is not supported",
        ),
    ],
)
def test_what_deepspeed_raises_is_one_line(content, told):
    with pytest.raises(ConfigError) as caught, refusals(_unchecked(content)):
        _read(content)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 64


def _of_torch():
    import torch

    torch.zeros(2) @ torch.zeros(3)


def _lost():
    raise RuntimeError("[../third_party/gloo/pair.cc:534] Connection closed by peer")


@pytest.mark.parametrize(
    ("raising", "kind"),
    [
        (_of_torch, RuntimeError),
        (_lost, RuntimeError),
        (lambda: (_ for _ in ()).throw(NumericsError("not finite")), NumericsError),
        (lambda: json.loads("{"), json.JSONDecodeError),
    ],
    ids=["torch", "lost peer", "ours", "standard library"],
)
def test_what_others_raise_stays_theirs(raising, kind):
    with pytest.raises(kind), refusals(_unchecked({})):
        raising()


def _load_model(content):
    """As one that is loaded while DeepSpeed shards its weights."""
    try:
        _read(content)
    except ValueError as error:
        raise ConfigError("cannot load model 'x'") from error


def test_a_mistake_of_the_configuration_is_not_blamed_on_the_model():
    content = {"zero_optimization": {"stage": 9}}
    with pytest.raises(ConfigError, match=r"my\.json: 'zero_optimization\.stage'"), refusals(_unchecked(content)):
        _load_model(content)


def _start(content):
    """Build a student's engine with a configuration that no check has seen. Runs on every rank."""
    import tests.helpers.training as training

    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    plan = training.Setting.plan
    training.Setting.plan = lambda self, world: (plan(self, world)[0], _unchecked(batch | content))
    try:
        trainer = build_trainer(Setup(ROWS[1], stage=2))
        trainer.step(0)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.dist
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            {"zero_optimization": {"stage": 2}, "prescale_gradients": True},
            "my.json: 'zero_optimization': DeepSpeed refuses it: pre-scale gradients is not yet supported with ZeRO-2",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000}},
            "my.json: 'zero_optimization': its backward pass fails: output with shape [1] doesn't match",
        ),
    ],
    ids=["initialize", "first step"],
)
def test_engines_and_first_steps_are_refused_in_one_line(content, told):
    for message in run_world(_start, 2, content):
        assert message is not None
        assert message.startswith(told)
        assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "told"),
    [  # each ended in a traceback, or trained something else in silence
        ({"bf16": True}, "'bf16' is true, which is not an object: write one, such as {\"enabled\": true}"),
        ({"bf16": None}, "'bf16' is null, which is not an object"),
        ({"bf16": {"enabled": "false"}}, "'bf16.enabled' is \"false\": give true or false"),
        ({"bf16": {"enabld": True}}, "unknown key 'bf16.enabld': did you mean 'enabled'?"),
        ({"fp16": {"los_scale": 0}}, "unknown key 'fp16.los_scale': did you mean 'loss_scale'?"),
        ({"comms_logger": {"enabld": True}}, "did you mean 'enabled'?"),
        ({"tensorboard": {"enabld": True}}, "did you mean 'enabled'?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean 'grad_accum_dtype'?"),
        ({"torch_autocast": {"enable": True}}, "unknown key 'torch_autocast.enable': did you mean 'enabled'?"),
        ({"compile": {"enabled": True}}, "'compile': nothing is compiled"),
        ({"compile": {"deepcompile": True}}, "'compile': nothing is compiled"),
        ({"communication_data_type": "bf32"}, "give one of fp32, bf16, fp16"),
        ({"zero_optimization": {"stage": 3}, "prescale_gradients": True}, "'prescale_gradients': "),
        ({"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2.0}, "'gradient_predivide_factor': "),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "'zero_optimization.compute_grad_norm': "),
        ({"sparse_gradients": True}, "'sparse_gradients': DeepSpeed has removed it"),
        ({"wandb": {"enabled": True}}, "'wandb': set log.wandb = true in the recipe"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "'bf16.bf16_master_weights_and_grads': "),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'write "offload_optimizer": {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "'zero_optimization.zenflow': "),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "'zero_optimization.offload_optimizer.super_offload': ",
        ),
        (
            {"zero_optimization": {"stage3_module_granularity_threshold": 10}},
            "'zero_optimization.stage3_module_granularity",
        ),
        (
            {"zero_optimization": {"leaf_module": {"classes": ["NoSuchLayer"]}}},
            "'zero_optimization.leaf_module': a leaf",
        ),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, "ZeRO++ trains with rounded weights"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "'zero_optimization.zero_hpz_partition"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "'zero_optimization.zero_quantized_wei"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "'zero_optimization.offload_param.device' is \"cpu\", which works at ZeRO stage 3 and not at 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            "which works at ZeRO stage 3 and not at 2",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "works at ZeRO stage 1, 2 or 3 and not at 0"),
        ({"zero_optimization": True}, "'zero_optimization' is true, which is not an object"),
        ({"zero_optimization": {"stage": "auto"}}, "which nothing fills in: give 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "give 0, 1, 2 or 3"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            "'data_types.grad_accum_dtype' is bf16 and the weights are fp32",
        ),
        ({"data_types": {"param_dtype": "bf16"}}, "'data_types.param_dtype' is bf16 and the weights are fp32"),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "'bf16.immediate_grad_update' is read at ZeRO"),
        ({"comms_logger": {"enabled": True}}, "write both, or leave it out"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
            "'optimizer.params.lr' is 1e-05: give \"auto\" (dspr",
        ),
        ({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}}, "'optimizer.type' is \"Lion\": give one of adam"),
        ({"scheduler": {"type": "OneCycle", "params": {"x": 1}}}, "'scheduler.type' is \"OneCycle\""),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "'fp16.loss_scale': Value error, fp16.loss_scale must be >= 0"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": -1}}, "'zero_optimization.sub_group_size' is -1"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_files_that_broke_are_refused_in_one_line(content, told):
    with pytest.raises(ConfigError) as caught:
        check_ds_config(content, "my.json")
    assert any(told in mistake for mistake in caught.value.mistakes), caught.value.mistakes
    assert all(mistake.startswith("my.json: ") and "\n" not in mistake for mistake in caught.value.mistakes)


def test_a_key_that_stands_twice_is_told(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}')
    with pytest.raises(ConfigError, match="'bf16' stands twice"):
        load_ds_config(str(path))
