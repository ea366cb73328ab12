"""Faults 23, 24, 26, 27: what a run is given is wrong; told at once, all of it, before anything is spent.

The table of single mistakes with their messages stands in tests/run/test_bad_input.py; here is what holds for all.
"""

import json
import time

import pytest
import torch

from dsprune.arch import family_for
from dsprune.engine.zero.config import list_ds_configs, load_ds_config, zero_stage
from dsprune.errors import ArchitectureError, ConfigError, DataError
from dsprune.run.launch import load
from dsprune.structure import analyze
from dsprune.tasks.sources.readers import read_files
from tests.helpers.models import tiny_model
from tests.helpers.runs import execute, words
from tests.helpers.world import run_to_the_end
from tests.run import test_bad_input

BAD_KEYS = {
    "prune.targte=0.5": "did you mean 'target'",
    "prune.target=1.5": "'prune.target' = 1.5",
    "prune.target=much": "'prune.target' = 'much'",
    "prune.duration=10": "expected a duration",
    "prune.duration=1.5 steps": "steps are whole",
    "prune.start=middle": "'prune.start' = 'middle'",
    "prune.lr=0": "'prune.lr' = 0",
    "prune.clip=-1": "'prune.clip' = -1",
    "batch.size=0": "'batch.size' = 0",
    "batch.micro=two": "'batch.micro' = 'two'",
    "batch.sizes=2": "did you mean 'size'",
    "checkpoint.keep=1": "'checkpoint.keep' = 1",
    "checkpoint.resume=maybe": "'checkpoint.resume' = 'maybe'",
    "checkpoint.evry=1 steps": "did you mean 'every'",
    "cluster.margin_minutes=-1": "'cluster.margin_minutes' = -1",
    "cluster.timeout_minutes=0": "'cluster.timeout_minutes' = 0",
    "cluster.time_limit=5": "did you mean 'time_limit_minutes'",
    "distill.match=best": "'distill.match' = 'best'",
    "distill.temperature=0": "'distill.temperature' = 0",
    "distill.logit=1": "did you mean 'logits'",
    "teacher.warmup=1.0": "'teacher.warmup' = 1.0",
    "teacher.schedule=cosine": "'teacher.schedule' = 'cosine'",
    "recover.duration=0": "expected a duration",
    "eval.evry=1 steps": "did you mean 'every'",
    "log.every=0": "'log.every' = 0",
    "log.wandbb=true": "did you mean 'wandb'",
    "task.max_length=1": "'task.max_length' = 1",
    "task.nam=sst2": "did you mean 'name'",
    "data.max_train_examples=0": "'data.max_train_examples' = 0",
    "data.pth=/x": "did you mean 'path'",
    "seed=-1": "'seed' = -1",
    "seeed=1": "did you mean 'seed'",
    "outptu=x": "did you mean 'output'",
    "model=bert": "'model' = 'bert'",
    "model.revison=x": "did you mean 'revision'",
    "method.name=coffi": "did you mean 'cofi'",
    "method.lrr=1": "unknown key 'method.lrr'",
    "method.lr=fast": "'method.lr' = 'fast'",
    "method.init=1e9": "'method.init'",
    "deepspeed.studnet=zero2": "did you mean 'student'",
    'stages=["prune", "teacher"]': "in this order",
    'stages=["prun"]': "'stages.0' = 'prun'",
    "stages=[]": "in this order",
    "target": "not of the form key=value",
}


@pytest.mark.parametrize("override", BAD_KEYS)
def test_f23_bad_key_or_value(override):
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load("demo", [override])
    assert BAD_KEYS[override] in str(caught.value)
    assert caught.value.exit_code == 64
    assert time.monotonic() - began < 2


def test_f23_all_mistakes_at_once():
    overrides = ["prune.targte=0.5", "batch.size=0", "seed=-1", "method.lrr=1", "distill.match=best"]
    with pytest.raises(ConfigError) as caught:
        load("demo", overrides)
    assert len(caught.value.mistakes) == len(overrides)


BAD_DS = {
    "zero_optimisation": ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'"),
    "gradient_clippping": ({"gradient_clippping": 1.0}, "did you mean 'gradient_clipping'"),
    "stge": ({"zero_optimization": {"stge": 3}}, "did you mean 'stage'"),
    "stage 7": ({"zero_optimization": {"stage": 7}}, "zero_optimization"),
    "optimizer": ({"optimizer": {"type": "Adam", "params": {"lr": "1e-5"}}}, "set lr and weight_decay in the recipe"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "set schedule and warmup in the recipe"),
    "two precisions": ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both enabled"),
    "amp": ({"amp": {"enabled": True}}, "use bf16 or fp16"),
}


@pytest.mark.parametrize("case", BAD_DS)
def test_f24_bad_ds_config(tmp_path, case):
    content, message = BAD_DS[case]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load_ds_config(str(path))
    assert message in str(caught.value)


def test_f24_every_shipped_ds_config_has_the_stage_of_its_name():
    for name in list_ds_configs():
        stage = zero_stage(load_ds_config(name))
        assert stage == (int(name.partition("zero")[2][0]) if "zero" in name else 0), name


@pytest.mark.dist
@pytest.mark.parametrize(
    ("train", "message"),
    [
        (test_bad_input.GOOD + "one more,7\n", "label"),
        (test_bad_input.GOOD.replace("sentence", "text"), "sentence"),
    ],
)
def test_f26_bad_data_is_told_on_all_ranks(place, tmp_path, train, message):
    """Two of the many in tests/run/test_bad_input.py."""
    ending = run_to_the_end(
        execute,
        2,
        words(place, tmp_path / "run")[0],
        f"output={tmp_path / 'run'}",
        *test_bad_input._data(tmp_path, train),
    )
    assert ending.codes == [65, 65], ending.log
    assert "train.csv" in ending.log
    assert message in ending.log


BAD_FILES = {
    "truncated.parquet": b"PAR1\x15\x04\x15",
    "half.jsonl": b'{"sentence": "a", "label": 1}\n{"sentence": "b", "la',
    "ragged.csv": b"sentence,label\na,1\nb,2,3\n",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_f26_bad_files_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(DataError) as caught:
        read_files([path], "train", text_columns=())
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 65


def test_f27_an_upstream_rename_is_listed():
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[1].attention.self
    layer.queries = layer.query
    del layer.query
    with pytest.raises(ArchitectureError) as caught:
        analyze(model)
    assert caught.value.exit_code == 65
    assert "quer" in str(caught.value)


def test_f27_an_unknown_parameter_is_listed():
    model = tiny_model("bert")
    model.bert.encoder.layer[0].adapter = torch.nn.Linear(32, 32)
    with pytest.raises(ArchitectureError, match="adapter"):
        analyze(model)
    with pytest.raises(ArchitectureError, match="mamba"):
        family_for("mamba")
