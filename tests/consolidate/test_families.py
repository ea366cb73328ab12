"""Every family, head and stage through the whole of consolidation, and on to people who have no dsprune."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from dsprune.consolidate import apply_selection, consolidate, load_compact
from dsprune.consolidate.manifest import FORMAT, render_manifest
from dsprune.errors import CheckpointError
from dsprune.structure import Selection, analyze, ones
from tests.helpers.checkpoints import write_manifest, write_run
from tests.helpers.folders import tiny_tokenizer
from tests.helpers.models import BARE_T5, DECODERS, ENCODER_DECODERS, FAMILIES, HEADS, batch_for, tiny_batch, tiny_model
from tests.helpers.selections import random_gates
from tests.helpers.stranger import run_stranger


def _selection(model, seed=1, *, soft=True):
    structure = analyze(model)
    return Selection.from_gates(structure, random_gates(structure, seed, soft=soft))


def _output(model):
    with torch.no_grad():
        return model.eval()(**batch_for(model))[0]


@pytest.mark.parametrize(
    "name", [*FAMILIES, *HEADS, *DECODERS, "qwen2-sequence", "gpt2-sequence", *ENCODER_DECODERS, *BARE_T5]
)
def test_what_is_exported_is_what_surgery_makes(name, tmp_path):
    model = tiny_model(name)
    selection = _selection(model)
    report = consolidate(write_run(tmp_path / "run", model, selection=selection), tmp_path / "out")
    assert report.difference <= 1e-5
    loaded = load_compact(tmp_path / "out")
    assert torch.equal(_output(loaded), _output(apply_selection(model, selection)))
    assert sum(param.numel() for param in loaded.parameters()) == report.parameters


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODER_DECODERS])
def test_a_recovered_model_keeps_its_shapes(name, tmp_path):
    model = tiny_model(name)
    compact = apply_selection(model, _selection(model))
    run = write_run(tmp_path / "run", compact, stage="recover")
    report = consolidate(run, tmp_path / "out", stage="recover")
    assert report.difference is None
    assert report.parameters < report.dense_parameters
    assert torch.equal(_output(load_compact(tmp_path / "out")), _output(compact))
    auto = "AutoModelForSequenceClassification" if name in FAMILIES else "AutoModelForSeq2SeqLM"
    assert auto in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODER_DECODERS])
def test_a_teacher_becomes_a_stock_folder(name, tmp_path):
    model = tiny_model(name)
    report = consolidate(write_run(tmp_path / "run", model, stage="teacher"), tmp_path / "out", stage="teacher")
    assert report.stock
    assert report.total_sparsity == 0
    auto = AutoModelForSequenceClassification if name in FAMILIES else AutoModelForSeq2SeqLM
    stock = auto.from_pretrained(tmp_path / "out")
    assert type(stock) is type(model)
    assert torch.equal(_output(stock), _output(model))


def test_a_uniform_choice_becomes_a_stock_folder(tmp_path):
    model = tiny_model("bert")
    gates = ones(analyze(model))
    gates["attn"][0] = gates["ffn"][0] = 0
    run = write_run(tmp_path / "run", model, selection=Selection.from_gates(analyze(model), gates))
    assert consolidate(run, tmp_path / "out").stock
    assert not (tmp_path / "out" / "modeling_dsprune.py").exists()
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(stock) is type(model)
    assert torch.equal(_output(stock), _output(load_compact(tmp_path / "out")))


def test_labels_and_problem_pass_through(tmp_path):
    model = tiny_model("bert")
    model.config.id2label = {0: "wrong", 1: "right"}
    model.config.label2id = {"wrong": 0, "right": 1}
    model.config.problem_type = "single_label_classification"
    consolidate(write_run(tmp_path / "run", model, selection=_selection(model)), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "wrong", 1: "right"}
    assert config.problem_type == "single_label_classification"


STRANGER = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
root, names = sys.argv[1], sys.argv[2:]
batch = load_file(f"{root}/batch.safetensors")
torch.set_num_threads(1)
Auto = AutoModelForSequenceClassification
for name in names:
    folder = f"{root}/{name}"
    model = Auto.from_pretrained(folder, trust_remote_code=True).eval()
    fused = "sdpa" if type(model)._supports_sdpa else "eager"
    assert model.config._attn_implementation == fused, model.config._attn_implementation
    eager = Auto.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
    half = Auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == bare.config.hidden_size
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.allclose(eager(**batch).logits, logits, atol=1e-5)
        assert half(**batch).logits.dtype is torch.bfloat16
        assert bare(**batch).last_hidden_state.shape[-1] == model.config.hidden_size
    model.save_pretrained(f"{folder}-again")
    again = Auto.from_pretrained(f"{folder}-again", trust_remote_code=True).eval()
    AutoModel.from_pretrained(f"{folder}-again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, logits)
    model.train().gradient_checkpointing_enable()
    model(**batch, labels=torch.zeros(len(logits), dtype=torch.long)).loss.backward()
    assert all(param.grad is not None for param in model.parameters())
    save_file({"logits": logits}, f"{folder}.safetensors")
    AutoTokenizer.from_pretrained(folder)
    pipe = pipeline("text-classification", model=folder, trust_remote_code=True)
    assert 0 <= pipe("the first door is red")[0]["score"] <= 1
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A compact folder of every family, with a tokenizer."""
    root = tmp_path_factory.mktemp("folders")
    for name in FAMILIES:
        model = tiny_model(name)
        run = write_run(root / f"run-{name}", model, selection=_selection(model, 2, soft=False))
        checkpoint = run / "prune" / "checkpoints" / "step-00000001"
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 30
        tokenizer.save_pretrained(checkpoint / "model")
        write_manifest(checkpoint)
        consolidate(run, root / name)
    save_file(tiny_batch(), root / "batch.safetensors")
    return root


def test_strangers_can_use_every_family(folders, tmp_path):
    run_stranger(STRANGER, tmp_path, folders, *FAMILIES)
    for name in FAMILIES:
        theirs = load_file(folders / f"{name}.safetensors")["logits"]
        torch.testing.assert_close(theirs, _output(load_compact(folders / name)), rtol=1e-5, atol=1e-6)


def test_tokenizers_load_where_dsprune_is(folders):
    for name in FAMILIES:
        assert AutoTokenizer.from_pretrained(folders / name)("the first")["input_ids"]


def _checkpoint(run):
    return run / "prune" / "checkpoints" / "step-00000001"


def test_a_selection_of_another_model_is_refused(tmp_path):
    model = tiny_model("bert")
    run = write_run(tmp_path / "run", model, selection=_selection(model))
    gates = {kind: gate.clone() for kind, gate in _selection(model).gates.items()} | {"attn": torch.ones(5)}
    Selection(gates).save(_checkpoint(run) / "selection.safetensors")
    write_manifest(_checkpoint(run))
    with pytest.raises(CheckpointError, match="selection of another model: gate 'attn'"):
        consolidate(run, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_values_that_are_not_finite_are_refused(dtype, tmp_path):
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.weight[0] = 1e6 if dtype == "float16" else float("nan")
    run = write_run(tmp_path / "run", model, selection=_selection(model))
    with pytest.raises(CheckpointError, match=r"classifier\.weight' holds values that are not finite"):
        consolidate(run, tmp_path / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("verify.safetensors", b"\x00" * 20, "verify.safetensors cannot be read"),
        ("selection.safetensors", b"\x00" * 20, "cannot read the selection"),
        ("figures.json", b"{", "figures.json cannot be read"),
        ("model/config.json", b"[1]", "config.json does not hold a table"),
        ("model/config.json", b"{}", "names the architecture ''"),
        ("student/mp_rank_00_model_states.pt", b"\x80\x02}q\x00.", "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_clear_error(name, content, message, tmp_path):
    model = tiny_model("bert")
    run = write_run(tmp_path / "run", model, selection=_selection(model))
    (_checkpoint(run) / name).write_bytes(content)
    write_manifest(_checkpoint(run))
    with pytest.raises(CheckpointError, match=message) as caught:
        consolidate(run, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_batch_of_another_model_is_refused(tmp_path):
    model = tiny_model("bert")
    run = write_run(tmp_path / "run", model, selection=_selection(model))
    save_file({"input_ids": torch.full((1, 4), 10_000)}, _checkpoint(run) / "verify.safetensors")
    write_manifest(_checkpoint(run))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        consolidate(run, tmp_path / "out")


def test_a_manifest_without_files_is_refused(tmp_path):
    model = tiny_model("bert")
    run = write_run(tmp_path / "run", model, selection=_selection(model))
    (_checkpoint(run) / "MANIFEST.json").write_text(render_manifest({"format": FORMAT, "files": {"a": 1}}))
    with pytest.raises(CheckpointError, match="does not list the checkpoint's files"):
        consolidate(run, tmp_path / "out")
