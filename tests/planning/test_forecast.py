"""Memory foretold: exact where it can be counted by hand, and the command for models of any size."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

from dsprune.cli import main
from dsprune.engine.zero.config import load_ds_config
from dsprune.errors import ConfigError
from dsprune.planning.activations import MicroStep, TeacherPass, trace_step, trace_teacher
from dsprune.planning.forecast import plan_model
from dsprune.planning.states import engine_states
from tests.helpers.language import tiny_gpt2, tiny_llama, tiny_t5
from tests.helpers.models import FAMILIES

SIZES = (3_000_000, 2_000_000, 1000)
TOTAL = sum(SIZES)


def _config(name, **changes):
    config = load_ds_config(name)
    config["zero_optimization"] |= changes
    return config


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("zero0", 2, {"parameters": 4, "gradients": 4, "masters": 0, "optimizer": 8}),
        ("zero1", 2, {"parameters": 4, "gradients": 4, "masters": 2, "optimizer": 4}),
        ("zero2_bf16", 4, {"parameters": 2, "gradients": 0.5, "masters": 1, "optimizer": 2}),
        ("zero3_bf16", 4, {"parameters": 0.5, "gradients": 0.5, "masters": 1, "optimizer": 2}),
        ("zero3", 1, {"parameters": 4, "gradients": 4, "masters": 0, "optimizer": 8}),
    ],
)
def test_states_as_in_the_paper(name, ranks, expected):
    config = _config(name, stage3_param_persistence_threshold=0)
    states = engine_states(SIZES, config, ranks, trained=True)
    assert {part: getattr(states, part) / TOTAL for part in expected} == pytest.approx(expected)


def test_small_weights_stay_whole_and_offloaded_ones_leave():
    config = _config("zero3", stage3_param_persistence_threshold=2_000_000)
    states = engine_states(SIZES, config, 2, trained=False)
    assert states.parameters == 4 * (TOTAL / 2 + 2_001_000)
    assert states.gathered == 4 * 3_000_000
    nvme = engine_states(SIZES, load_ds_config("zero3_nvme"), 2, trained=True)
    assert nvme.disk == (4 + 8) * TOTAL / 2
    assert nvme.optimizer == nvme.masters == nvme.gradients == 0


def _trace(build, lecture=None, **changes):
    micro = {"batch": 2, "length": 16, "dtype": torch.float32, "chunk": 8} | changes
    return trace_step(build, MicroStep(**micro), lecture)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5, lambda: FAMILIES["deberta-v2"]()])
def test_activations_grow_with_tokens_and_shrink_with_checkpointing(build):
    few, many = _trace(build, batch=8), _trace(build, batch=16)
    assert 1.8 < many / few < 2.1
    again = _trace(build, batch=16, checkpointing=True)
    assert again < 0.8 * many
    assert _trace(build, TeacherPass(32, (1, 2), gathers_head=True), batch=16) > many


def _bert(depth, width):
    config = BertConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=2 * width
    )
    return BertForSequenceClassification(config)


def test_states_of_the_layers_that_teach_are_held_while_the_teacher_answers():
    micro = MicroStep(batch=2, length=16, dtype=torch.float32, chunk=8)
    state = 2 * 16 * 64 * 4
    few, many = (trace_teacher(lambda: _bert(8, 64), micro, layers) for layers in ((1, 8), tuple(range(1, 9))))
    # The first is held while the others are made; with all of them, their real tokens are taken beside them.
    assert few == trace_teacher(lambda: _bert(8, 64), micro, ()) + state
    assert 6 * state <= many - few <= 8 * state


def test_each_layer_that_teaches_has_its_pair_of_states():
    build, wide = (lambda: _bert(2, 32)), 64
    few, many = (_trace(build, TeacherPass(wide, partners, gathers_head=False)) for partners in ((1, 2), (1, 1, 2, 2)))
    taught, learned = 2 * 16 * wide * 4, 2 * 16 * 32 * 4
    # The teacher's, once more stacked, and the projected ones, with their gradient; the student's, stacked.
    assert many - few >= 2 * (3 * taught + learned)
    assert many - few <= 2 * (6 * taught + 2 * learned)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "layers 2, 3, 4, 6 of the teacher teach, beside layers 1, 1, 1, 2 of the student"),
        (["--teacher-layers", "0", "4"], "layers 0, 4 of the teacher teach, beside layers 0, 1 of the student"),
    ],
)
def test_layers_that_teach_are_the_teachers(tmp_path, capsys, words, told):
    for name, depth in (("student", 2), ("teacher", 6)):
        _bert(depth, 32).config.save_pretrained(tmp_path / name)
    models = [str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--length", "16"]
    assert main(["plan", *models, *words]) == 0
    assert told in capsys.readouterr().out
    assert main(["plan", *models, "--teacher-layers", "7"]) == 64
    assert "name layers from 1 to 6" in capsys.readouterr().err


def test_activations_of_a_linear_layer_by_hand():
    """Saved inputs and outputs of a model that is nothing but embedding, one head, and its chunked loss."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=4096, hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1
    )
    small, large = (_trace(lambda: LlamaForCausalLM(config), length=64, chunk=chunk) for chunk in (16, 64))
    # Of logits there are a chunk's, several times over, and never more.
    per_row = (large - small) / 48
    assert 2 * 4 * 4096 <= per_row <= 6 * 4 * 4096


@pytest.mark.slow
def test_a_model_of_any_size_is_planned_without_weights(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 80, **sizes}
    (tmp_path / "large.json").write_text(json.dumps(config))
    arguments = {"teacher": None, "ranks": 64, "batch": 1, "length": 2048, "chunk": 512}
    text = plan_model(
        str(tmp_path / "large.json"), student_ds="zero3_bf16", teacher_ds="teacher_zero3_bf16", **arguments
    )
    assert "68,976,648,192 parameters" in text
    assert "checkpointing" in text
    assert "zero3_nvme" in text


@pytest.mark.parametrize(
    ("sizes", "total"),
    [
        ({"d_ff": 2048, "num_layers": 6, "num_heads": 8}, 60_506_624),
        ({"num_heads": 6, "d_ff": 1024, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, 76_961_152),
    ],
    ids=["the head is the word embedding", "a head of its own"],
)
def test_a_t5_is_planned_with_the_head_that_it_has(tmp_path, sizes, total):
    """The small models of both kinds, as published."""
    config = {"model_type": "t5", "num_layers": 8, "d_model": 512, "d_kv": 64, "vocab_size": 32128, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = {"teacher": None, "ranks": 2, "batch": 1, "length": 16, "chunk": 512}
    text = plan_model(str(tmp_path), student_ds="zero3", teacher_ds="teacher_zero3", **arguments)
    assert f"student {tmp_path}: {total:,} parameters" in text


def test_what_cannot_be_planned_is_told(tmp_path):
    arguments = {"teacher": None, "student_ds": "zero3", "batch": 1, "length": 8, "chunk": 8}
    with pytest.raises(ConfigError, match=r"--ranks 0: at least 1"):
        plan_model(str(tmp_path), teacher_ds="teacher", ranks=0, **arguments)
    with pytest.raises(ConfigError, match="ZeRO stage 2 shards"):
        plan_model(str(tmp_path), teacher_ds="zero2", ranks=1, **arguments)
    with pytest.raises(ConfigError, match=r"nowhere"):
        plan_model(str(tmp_path / "nowhere"), teacher_ds="teacher", ranks=1, **arguments)
