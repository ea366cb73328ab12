"""What the files of a model are to the model that is wanted: nothing random for what was trained, nothing permuted."""

import json
import logging
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from dsprune.config import DataConfig, TaskConfig
from dsprune.engine.models.load import load_model
from dsprune.engine.models.source_check import plan_loading
from dsprune.engine.models.weight_files import find_weights
from dsprune.engine.models.weight_names import match_names
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.tasks import build_task
from tests.helpers.folders import SIDE_FILES, fine_tuned_folder
from tests.helpers.models import ALL, batch_for, tiny_model
from tests.helpers.world import run_world

MNLI = build_task(TaskConfig(name="mnli"), DataConfig(), seed=0)
CONLL = build_task(TaskConfig(name="conll2003"), DataConfig(), seed=0)
ORDER = build_task(TaskConfig(name="order", max_length=16), DataConfig(), seed=0)
LM = build_task(TaskConfig(name="lm"), DataConfig(), seed=0)
SEQ2SEQ = build_task(TaskConfig(name="seq2seq"), DataConfig(dataset="none"), seed=0)
THEIRS = ("CONTRADICTION", "Entailment", "neutral")
"""The labels of MNLI as a released model has them; the task says entailment, neutral, contradiction."""

CLASSIFIERS = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "llama-sequence", "qwen2-sequence")
CLASSIFIERS += ("gpt2-sequence",)
SORTED_TAGS = sorted(CONLL.labels)


def _save(name, folder, labels=None, *, dtype=torch.float32, **changes):
    """A tiny model of a family as a folder, its head as wide as it has labels."""
    if labels is None:
        model = tiny_model(name, dtype=dtype)
    else:
        config = ALL[name]().config
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in config.id2label.items()}
        torch.manual_seed(0)
        model = type(ALL[name]())(config).eval()
        for param in model.parameters():
            torch.nn.init.normal_(param, std=0.2)
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    return model


def _edit(folder, change=lambda tensors: tensors, **config):
    """Change the weights and the configuration of a folder."""
    path = folder / "model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | config))


@torch.no_grad()
def _logits(model, batch=None):
    return model.eval()(**(batch or batch_for(model)))[0]


# --- the order of labels ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CLASSIFIERS, "token", "deberta-token"])
def test_outputs_come_in_the_order_of_the_task(name, tmp_path):
    task, labels = (CONLL, SORTED_TAGS) if name.endswith("token") else (MNLI, THEIRS)
    theirs = _save(name, tmp_path, labels)
    ours = load_model(str(tmp_path), task, {})
    order = [[label.lower() for label in labels].index(label.lower()) for label in task.labels]
    assert order != sorted(order)
    torch.testing.assert_close(_logits(ours), _logits(theirs)[..., order])
    assert [ours.config.id2label[i] for i in range(task.num_labels)] == list(task.labels)
    assert ours.config.label2id == {label: i for i, label in enumerate(task.labels)}


def _under_zero3(folders, task):
    from dsprune.engine.zero.config import load_ds_config, teacher_config
    from dsprune.engine.zero.gather import whole

    found = {}
    for folder in folders:
        model = load_model(str(folder), task, teacher_config(load_ds_config("teacher_zero3"), 2))
        found[folder.name] = {name: whole(model, name).numpy() for name, _ in model.named_parameters()}
    return found


@pytest.mark.dist
def test_under_zero3_the_same_weights_are_loaded(tmp_path):
    for name in ("bert", "roberta", "gpt2-sequence"):
        _save(name, tmp_path / name, THEIRS)
    _edit(tmp_path / "bert", lambda tensors: {f"module._orig_mod.{k}": v for k, v in tensors.items()})
    folders = sorted(tmp_path.iterdir())
    for rank in run_world(_under_zero3, 2, folders, MNLI):
        for folder in folders:
            expected = dict(load_model(str(folder), MNLI, {}).named_parameters())
            assert rank[folder.name].keys() == expected.keys()
            for name, value in rank[folder.name].items():
                assert torch.equal(torch.from_numpy(value), expected[name]), (folder.name, name)


def test_the_reordering_is_said(tmp_path, caplog):
    _save("bert", tmp_path, THEIRS)
    with caplog.at_level(logging.INFO):
        load_model(str(tmp_path), MNLI, {})
    said = "its labels (CONTRADICTION, Entailment, neutral) are the task's in another order"
    assert said in caplog.text
    assert "(entailment, neutral, contradiction)" in caplog.text


def test_default_names_are_believed_and_said(tmp_path, caplog):
    theirs = _save("bert", tmp_path, ["LABEL_0", "LABEL_1", "LABEL_2"])
    ours = load_model(str(tmp_path), MNLI, {})
    assert torch.equal(_logits(ours), _logits(theirs))
    assert ours.config.id2label[2] == "contradiction"
    assert "taken to be in the task's order (entailment, neutral, contradiction)" in caplog.text


@pytest.mark.parametrize("fresh", [True, False], ids=["model", "teacher"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("yes", "perhaps", "no"), r"\(yes, perhaps, no\) are not the task's \(entailment, neutral, contradiction\)"),
        (("no", "yes"), r"has 2 labels \(no, yes\) and task 'mnli' has 3 \(entailment, neutral, contradiction\)"),
    ],
)
def test_other_labels_are_refused_with_both_lists(labels, message, fresh, tmp_path):
    _save("bert", tmp_path, labels)
    with pytest.raises(ArchitectureError, match=message):
        load_model(str(tmp_path), MNLI, {}, fresh_head=fresh)


def test_the_head_of_another_task_is_not_this_task_s(tmp_path, caplog):
    """Both heads are called `classifier`."""
    _save("bert", tmp_path, THEIRS)
    tags = build_task(TaskConfig(name="conll2003"), DataConfig(), seed=0)
    with caplog.at_level(logging.INFO):
        model = load_model(str(tmp_path), tags, {}, fresh_head=True)
    assert tuple(model.classifier.weight.shape) == (9, 32)
    assert "random weights, to be trained for task 'conll2003': classifier.bias, classifier.weight" in caplog.text
    with pytest.raises(
        ArchitectureError, match="is a BertForSequenceClassification, and task 'conll2003' needs a Bert"
    ):
        load_model(str(tmp_path), tags, {})


def test_a_head_under_the_configuration_of_the_base_is_taken(tmp_path):
    """Weights that a user saved by hand beside the configuration of the model they began with."""
    theirs = _save("bert", tmp_path, MNLI.labels)
    _edit(tmp_path, architectures=["BertForMaskedLM"])
    assert torch.equal(_logits(load_model(str(tmp_path), MNLI, {}, fresh_head=True)), _logits(theirs))


# --- weights that are missing, left over, of another shape ----------------------------------------


def _without(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize("fresh", [True, False], ids=["model", "teacher"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(QUERY), rf"is not complete: 1 weights are not there, the first is {re.escape(QUERY)}"),
        (_without("classifier.bias"), r"was not trained for task 'mnli': 1 weights are not there.* classifier\.bias"),
        (lambda t: {**t, QUERY: t[QUERY][:8]}, rf"{re.escape(QUERY)} is \[8, 32\] in its files and \[32, 32\] by its"),
        (lambda t: {f"net.{k}": v for k, v in t.items()}, "is not complete: .* weights are not there"),
    ],
)
def test_what_is_not_there_is_never_random(change, message, fresh, tmp_path):
    _save("bert", tmp_path, MNLI.labels)
    _edit(tmp_path, change)
    with pytest.raises(ArchitectureError, match=message) as caught:
        load_model(str(tmp_path), MNLI, {}, fresh_head=fresh)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)


def test_only_the_configured_model_may_lack_its_head(tmp_path, caplog):
    _save("bert", tmp_path, MNLI.labels)
    _edit(tmp_path, _without("classifier.bias", "classifier.weight"))
    with caplog.at_level(logging.INFO):
        load_model(str(tmp_path), MNLI, {}, fresh_head=True)
    assert "names a BertForSequenceClassification, and its files hold no head of one" in caplog.text
    with pytest.raises(ArchitectureError, match="2 weights are not there, the first is classifier"):
        load_model(str(tmp_path), MNLI, {})


def test_what_is_left_over_is_told(tmp_path, caplog):
    _save("bert", tmp_path, MNLI.labels)
    extra = {"bert.encoder.layer.2.output.dense.weight": torch.ones(2), "temperature": torch.ones(1)}
    _edit(tmp_path, lambda tensors: tensors | extra | {"bert.embeddings.position_ids": torch.arange(40)[None]})
    load_model(str(tmp_path), MNLI, {})
    assert "2 tensors of its files have no place in a BertForSequenceClassification" in caplog.text
    assert "the first is bert.encoder.layer.2.output.dense.weight" in caplog.text


def test_heads_of_pretraining_are_left_out_without_alarm(tmp_path, caplog):
    from transformers import BertForPreTraining

    torch.manual_seed(0)
    BertForPreTraining(ALL["bert"]().config).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        load_model(str(tmp_path), CONLL, {}, fresh_head=True)
    assert "not needed for task 'conll2003', left out: bert.pooler, cls" in caplog.text
    assert not [line for line in caplog.records if line.levelno >= logging.WARNING]


def test_a_base_without_its_pooler_gets_one_with_the_head(tmp_path, caplog):
    from transformers import BertForMaskedLM

    BertForMaskedLM(ALL["bert"]().config).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        load_model(str(tmp_path), MNLI, {}, fresh_head=True)
    assert "classifier.bias, classifier.weight" in caplog.text
    assert "bert.pooler.dense.bias, bert.pooler.dense.weight" in caplog.text


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "model.module."])
def test_what_wrappers_put_into_names_is_taken_off(prefix, tmp_path, caplog):
    theirs = _save("roberta", tmp_path, MNLI.labels)
    _edit(tmp_path, lambda tensors: {prefix + k: v for k, v in tensors.items()})
    with caplog.at_level(logging.INFO):
        ours = load_model(str(tmp_path), MNLI, {})
    assert torch.equal(_logits(ours), _logits(theirs))
    assert "in them, which is taken off" in caplog.text


def test_names_of_compiled_parts():
    expected = {"bert.encoder.layer.0.output.dense.weight", "classifier.weight"}
    names = ["bert._orig_mod.encoder.layer.0._orig_mod.output.dense.weight", "classifier.weight"]
    matched = match_names(names, expected, "bert")
    assert matched.named == {sorted(expected)[0]: names[0], "classifier.weight": "classifier.weight"}
    assert len(matched.renames) == 2


def test_a_name_that_belongs_to_the_model_is_not_taken_for_a_wrapper():
    expected = {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)} | {"model.norm.weight"}
    for names in (expected, {name.removeprefix("model.") for name in expected}):
        assert not match_names(sorted(names), expected, "model").renames
    twice = ["module.norm.weight", "norm.weight"]
    assert not match_names(twice, {"model.norm.weight"}, "model").renames, "one of two names that would be the same"


# --- heads that are the word embedding, or not ----------------------------------------------------


def _with_own_head(name, folder):
    """A checkpoint whose configuration ties a head that has values of its own."""
    model = tiny_model(name)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(model.get_output_embeddings().weight.shape, generator=generator) * 0.2
    _edit(folder, lambda tensors: tensors | {"lm_head.weight": head})
    return head


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "gpt2", "t5"])
def test_a_head_of_its_own_stays_one_whatever_the_configuration_says(name, tmp_path, caplog):
    head = _with_own_head(name, tmp_path)
    model = load_model(str(tmp_path), SEQ2SEQ if name == "t5" else LM, {})
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert not torch.equal(model.get_input_embeddings().weight, head)
    assert "the head of the files is used, and written" in caplog.text
    if name != "t5":
        assert model.config.tie_word_embeddings is False


@pytest.mark.dist
def test_a_head_of_its_own_under_zero3(tmp_path):
    head = _with_own_head("qwen2", tmp_path / "qwen2")
    for rank in run_world(_under_zero3, 2, [tmp_path / "qwen2"], LM):
        assert torch.equal(torch.from_numpy(rank["qwen2"]["lm_head.weight"]), head)


def test_equal_weights_under_both_names_are_one(tmp_path):
    """As every pickled checkpoint of a tied model has them."""
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    word = model.get_input_embeddings().weight.detach()
    _edit(tmp_path, lambda tensors: tensors | {"lm_head.weight": word.clone()})
    loaded = load_model(str(tmp_path), LM, {})
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.config.tie_word_embeddings is True


def test_a_head_that_is_not_there_is_never_random(tmp_path):
    """The configuration says that the head is its own, and the files hold one tensor for both."""
    tiny_model("qwen2").save_pretrained(tmp_path)
    _edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ArchitectureError, match=r'lm_head\.weight; .* to say "tie_word_embeddings": true'):
        load_model(str(tmp_path), LM, {})


# --- formats --------------------------------------------------------------------------------------


def _pickle(folder, shards=1):
    """Let a folder hold its weights pickled, as older versions wrote them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_load(shards, tmp_path):
    theirs = _save("bert", tmp_path, THEIRS)
    _pickle(tmp_path, shards)
    ours = load_model(str(tmp_path), MNLI, {})
    torch.testing.assert_close(_logits(ours), _logits(theirs)[..., [1, 2, 0]])
    assert find_weights(str(tmp_path), download=False).shapes["classifier.weight"] == (3, 32)


@pytest.mark.dist
def test_pickled_weights_load_under_zero3(tmp_path):
    _save("bert", tmp_path / "bert", THEIRS)
    _pickle(tmp_path / "bert", 2)
    expected = load_model(str(tmp_path / "bert"), MNLI, {}).classifier.weight
    for rank in run_world(_under_zero3, 2, [tmp_path / "bert"], MNLI):
        assert torch.equal(torch.from_numpy(rank["bert"]["classifier.weight"]), expected)


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_a_pickle_that_runs_code_is_refused_without_running_it(tmp_path, monkeypatch):
    _save("bert", tmp_path, MNLI.labels)
    _pickle(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save({"x": _Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"opening it would run code: refused.* writes model\.safetensors"):
        load_model("./", MNLI, {})
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Attack()))
    with pytest.raises(ConfigError):
        load_model("./", MNLI, {})
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no model\.safetensors and no pytorch_model\.bin; to begin with random weights, say model\.from_scratch"),
        ({"tf_model.h5": b""}, r"tf_model\.h5 is not read: .* save_pretrained$"),
        ({"model.fp16.safetensors": b""}, r"model\.fp16\.safetensors is not read"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "holds an adapter alone: merge it"),
        ({"model.safetensors": b"12345678{}"}, r"model\.safetensors cannot be read: it is damaged"),
        ({"pytorch_model.bin": b"PK\x03\x04"}, r"pytorch_model\.bin "),
        ({"pytorch_model.bin.index.json": b"{}"}, "is not the index of a model's weights"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'},
            r"model-00001-of-00001\.safetensors is missing, which its index lists",
        ),
    ],
)
def test_weights_that_are_not_to_be_had(files, message, tmp_path):
    AutoConfig.for_model("bert", **{"num_hidden_layers": 1}).save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(str(tmp_path), MNLI, {}, fresh_head=True)
    assert "from_scratch" not in str(caught.value) or not files, "advice that loses weights"


def test_a_training_checkpoint_is_no_model(tmp_path):
    _save("bert", tmp_path, MNLI.labels)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": {"x": torch.ones(1)}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no table of named tensors \(its weights may stand under 'state_dict'\)"):
        load_model(str(tmp_path), MNLI, {})


def test_a_source_is_spoken_of_once(tmp_path, caplog):
    _save("bert", tmp_path, THEIRS)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            plan_loading(str(tmp_path), MNLI)
    assert caplog.text.count("in another order") == 1


def test_weights_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    """A model that is known by its name alone, pickled, and one of which only the configuration is here."""
    commit = "0" * 40
    for name in ("whole", "bare"):
        place = tmp_path / f"models--who--{name}"
        theirs = _save("bert", place / "snapshots" / commit, THEIRS)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
    _pickle(tmp_path / "models--who--whole" / "snapshots" / commit)
    (tmp_path / "models--who--bare" / "snapshots" / commit / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ours = load_model("who/whole", MNLI, {})
    torch.testing.assert_close(_logits(ours), _logits(theirs)[..., [1, 2, 0]])
    assert plan_loading("who/bare", MNLI, download=False).order == [1, 2, 0], "as far as is known without weights"
    with pytest.raises(ConfigError, match="neither the hub nor its cache shows any"):
        load_model("who/bare", MNLI, {})


def test_what_lies_beside_a_model_of_the_hub(tmp_path, monkeypatch):
    from dsprune.engine.models.load import load_tokenizer
    from dsprune.engine.models.side_files import copy_side_files

    commit = "1" * 40
    place = tmp_path / "hub" / "models--who--chat"
    fine_tuned_folder(place / "snapshots" / commit, ["a", "b"])
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "generation_config.json").write_text("own")
    for source, settings in ((place.name, SIDE_FILES["generation_config.json"]), ("own", "own")):
        out = tmp_path / f"out-{source}"
        out.mkdir()
        weights = "who/chat" if source != "own" else str(tmp_path / "own")
        copy_side_files("who/chat", weights, load_tokenizer("who/chat"), out, revision=None)
        expected = SIDE_FILES | {"generation_config.json": settings}
        assert {name: (out / name).read_text() for name in expected} == expected
        assert not list(out.glob("*.safetensors"))
