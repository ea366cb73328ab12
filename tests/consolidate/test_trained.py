"""What is exported is what was trained: by its shards and by what the live engine said, whatever files claim."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dsprune.consolidate import consolidate, verify
from dsprune.errors import CheckpointError
from dsprune.structure import Selection, analyze
from tests.helpers.checkpoints import write_manifest, write_run
from tests.helpers.models import batch_for, tiny_model
from tests.helpers.selections import random_gates

CHECKPOINT = "prune/checkpoints/step-00000001"


def _untied(name):
    """A live model whose head was untied after its configuration was made."""
    model = tiny_model(name)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    assert model.config.tie_word_embeddings
    return model


def _record(run, model, change=lambda logits: logits):
    """Write what the live model says, as a run does."""
    with torch.no_grad():
        logits = verify.sample(verify.outputs(model(**verify.shortened(batch_for(model)))))
    verify.record(run / CHECKPOINT, change(logits))
    write_manifest(run / CHECKPOINT)


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "gpt2", "t5"])
def test_a_head_that_was_trained_apart_is_exported(name, pruned, tmp_path):
    model = _untied(name)
    structure = analyze(model)
    selection = Selection.from_gates(structure, random_gates(structure, 3)) if pruned else None
    consolidate(write_run(tmp_path / "run", model, selection=selection), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if name == "t5":  # there this key says whether the head's inputs are scaled, and theirs are
        assert (config["own_head"], config["tie_word_embeddings"], config["scale_decoder_outputs"]) == (True,) * 3
    else:
        assert config["tie_word_embeddings"] is False
    if pruned:
        return  # compared with the masked model by the export itself
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    with torch.no_grad():
        theirs, ours = (
            one.eval()(**batch_for(model)).logits for one in (auto.from_pretrained(tmp_path / "out"), model)
        )
    torch.testing.assert_close(theirs, ours)


def test_a_tied_head_stays_tied(tmp_path):
    model = tiny_model("qwen2")
    consolidate(write_run(tmp_path / "run", model), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("name", ["bert", "token", "span", "llama", "t5"])
def test_the_export_says_what_the_live_model_said(name, tmp_path):
    model = tiny_model(name)
    run = write_run(tmp_path / "run", model)
    _record(run, model)
    consolidate(run, tmp_path / "out")
    assert not (tmp_path / "out" / verify.RECORDED).exists()
    wrong = {"permuted": lambda logits: logits.flip(-1), "scaled": lambda logits: logits * 1.01}
    for what, change in wrong.items():
        _record(run, model, change)
        with pytest.raises(CheckpointError, match=r"trained and written model: logits differ by .*; nothing was exp"):
            consolidate(run, tmp_path / what)
        assert not (tmp_path / what).exists()


def test_shards_of_another_model_than_the_one_that_was_trained(tmp_path):
    """As of a checkpoint put together from two."""
    run, other = (write_run(tmp_path / str(seed), tiny_model("bert", seed=seed)) for seed in (0, 1))
    _record(run, tiny_model("bert"))
    shutil.copytree(other / CHECKPOINT / "student", run / CHECKPOINT / "student", dirs_exist_ok=True)
    write_manifest(run / CHECKPOINT)
    with pytest.raises(CheckpointError, match="trained and written model"):
        consolidate(run, tmp_path / "out")


@pytest.mark.parametrize("half", ["written", "trained"])
def test_half_precision_is_compared_coarsely(half, tmp_path):
    model = tiny_model("bert")
    run = write_run(tmp_path / "run", model)
    dtype = "bfloat16" if half == "written" else "float32"
    _record(run, model.bfloat16() if half == "trained" else model)
    if half == "trained":
        path = run / CHECKPOINT / "MANIFEST.json"
        manifest = json.loads(path.read_text())
        del manifest["digest"]
        from dsprune.consolidate import render_manifest

        path.write_text(render_manifest({**manifest, "precision": "bf16"}))
    consolidate(run, tmp_path / "out", dtype=dtype)


def test_an_older_checkpoint_is_compared_with_its_weights(tmp_path, caplog):
    consolidate(write_run(tmp_path / "run", tiny_model("bert")), tmp_path / "out")
    assert "does not say what its model answered: compared with its weights alone" in caplog.text


def test_folders_beside_a_configuration_go_along(tmp_path):
    run = write_run(tmp_path / "run", tiny_model("bert"))
    templates = run / CHECKPOINT / "model" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    write_manifest(run / CHECKPOINT)
    consolidate(run, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
