"""Invariants 2 and 3: masked = compact, counted = real; for every family and head, over random and awkward gates."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dsprune.consolidate import apply_selection, load_compact
from dsprune.consolidate.modeling_dsprune import Bypass
from dsprune.errors import CheckpointError
from dsprune.structure import (
    CostModel,
    Selection,
    analyze,
    attach_gates,
    check_shape,
    gate_shapes,
    ones,
    shape_gates,
)
from tests.helpers.models import (
    BARE_T5,
    CLASSIFIERS,
    DECODERS,
    ENCODER_DECODERS,
    FAMILIES,
    HEADS,
    batch_for,
    tiny_batch,
    tiny_model,
)
from tests.helpers.selections import awkward_gates, random_gates

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
MASKED = [
    *((name, dtype, rank) for name in [*FAMILIES, *HEADS] for dtype in TOLERANCE for rank in (None, 5)),
    *((name, torch.float64, None) for name in [*DECODERS, *CLASSIFIERS, *ENCODER_DECODERS, *BARE_T5]),
    ("llama", torch.float32, 5),
]
"""Model, dtype and rank of the word embedding; fp64 tells all that fp32 does, and is enough for one kind of model."""


def _difference(model, structure, selection, dtype):
    """Largest difference between masked and compact outputs."""
    compact = apply_selection(model, selection)
    gating = attach_gates(model, structure, empty=selection.empty)
    gating.set({kind: gate.to(dtype) for kind, gate in selection.gates.items()})
    batch = batch_for(model)
    with torch.no_grad():
        masked, ours = model(**batch)[0], compact(**batch)[0]
    gating.remove()
    if masked.shape != ours.shape:  # the bare encoder hands out the residual stream itself
        masked = masked[..., selection.kept(structure.hidden)]
    assert masked.abs().max() > 1e-3
    return float((masked - ours).abs().max()), compact


@pytest.mark.parametrize("empty", ["identity", "bias"])
@pytest.mark.parametrize(("name", "dtype", "rank"), MASKED, ids=str)
def test_the_compact_model_is_the_masked_model(name, dtype, rank, empty):
    model = tiny_model(name, dtype=dtype, embedding_rank=rank)
    structure = analyze(model)
    cost = CostModel(structure, empty=empty)
    cases = dict(awkward_gates(structure))
    cases |= {f"hard {seed}": random_gates(structure, seed) for seed in range(2)}
    cases |= {f"soft {seed}": random_gates(structure, seed, soft=True) for seed in range(2)}
    for label, gates in cases.items():
        selection = Selection.from_gates(structure, gates, empty=empty)
        difference, compact = _difference(model, structure, selection, dtype)
        assert difference <= TOLERANCE[dtype], label
        real = sum(param.numel() for param in compact.parameters())
        assert real == int(cost.parameters(selection.hard(), of="total")), label


def test_a_removed_sublayer_costs_nothing():
    model = tiny_model("bert")
    gates = ones(analyze(model))
    gates["attn"][0] = 0
    gates["ffn"][1] = 0
    compact = apply_selection(model, Selection.from_gates(analyze(model), gates))
    first, second = compact.bert.encoder.layer
    assert isinstance(first.attention, Bypass)
    assert isinstance(second.output, Bypass)
    assert not list(first.attention.parameters())


def test_layers_without_sublayers_are_not_there():
    model = tiny_model("bert")
    gates = ones(analyze(model))
    gates["attn"][0] = 0
    gates["ffn_dim"][0] = 0
    compact = apply_selection(model, Selection.from_gates(analyze(model), gates))
    assert len(compact.bert.encoder.layer) == compact.config.num_hidden_layers == 1
    assert [layer["source"] for layer in compact.config.dsprune["layers"]] == [1]


def test_the_compact_model_trains_and_checkpoints_activations():
    model = tiny_model("bert")
    structure = analyze(model)
    compact = apply_selection(model, Selection.from_gates(structure, random_gates(structure, 1)))
    compact.activation_checkpointing_enable()
    compact.train()
    compact(**tiny_batch(), labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    assert all(param.grad is not None for param in compact.parameters())


@pytest.mark.parametrize("name", [*FAMILIES, *HEADS, *DECODERS, "llama-sequence", *ENCODER_DECODERS, *BARE_T5])
def test_save_pretrained_round_trips(name, tmp_path):
    model = tiny_model(name)
    structure = analyze(model)
    compact = apply_selection(model, Selection.from_gates(structure, random_gates(structure, 2)))
    compact.save_pretrained(tmp_path / "once")
    again = load_compact(tmp_path / "once").eval()
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "modeling_dsprune.py").exists()
    batch = batch_for(model)
    with torch.no_grad():
        expected = compact(**batch)[0]
        assert torch.equal(again(**batch)[0], expected)
        assert torch.equal(load_compact(tmp_path / "twice").eval()(**batch)[0], expected)


def test_the_auto_classes_know_compact_folders_once_dsprune_is_imported(tmp_path):
    model = tiny_model("roberta")
    structure = analyze(model)
    compact = apply_selection(model, Selection.from_gates(structure, random_gates(structure, 3)))
    compact.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch())[0], compact(**tiny_batch())[0])
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == "CompactRobertaModel"


@pytest.mark.parametrize("case", ["whole layers", "uniform ffn", "nothing"])
def test_uniform_sizes_become_a_stock_model(case, tmp_path):
    model = tiny_model("bert")
    structure = analyze(model)
    gates = ones(structure)
    if case == "whole layers":
        gates["attn"][0] = 0
        gates["ffn"][0] = 0
    if case == "uniform ffn":
        gates["ffn_dim"][:, ::2] = 0
    compact = apply_selection(model, Selection.from_gates(structure, gates))
    assert type(compact) is transformers.BertForSequenceClassification
    compact.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    stock = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(stock(**tiny_batch())[0], compact(**tiny_batch())[0])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("deberta-v2-unshared", {"ffn": 40, "layers": 1}), ("deberta-token", {"heads": 2, "hidden": 16})],
)
def test_uniform_sizes_with_a_table_of_positions_become_a_stock_model(name, shape, tmp_path):
    model = tiny_model(name, dtype=torch.float64)
    structure = analyze(model)
    check_shape(structure, shape, tuple(gate_shapes(structure.sizes)))
    selection = Selection.from_gates(structure, shape_gates(structure, shape))
    difference, compact = _difference(model, structure, selection, torch.float64)
    assert difference <= TOLERANCE[torch.float64]
    assert type(compact) is type(model)
    compact.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        # Not bit for bit: what is read from a file may be aligned in memory in another way.
        torch.testing.assert_close(stock(**tiny_batch())[0], compact(**tiny_batch())[0], rtol=0, atol=1e-12)


def test_uniform_heads_alone_are_not_stock():
    """A stock BERT with half the heads would make each twice as wide."""
    model = tiny_model("bert")
    gates = ones(analyze(model))
    gates["head"][:, 2:] = 0
    compact = apply_selection(model, Selection.from_gates(analyze(model), gates))
    assert type(compact).__name__ == "CompactBertForSequenceClassification"


def test_what_is_not_a_compact_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a model folder"):
        load_compact(tmp_path)
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="was not made by dsprune"):
        load_compact(tmp_path)


def test_a_compact_folder_that_is_not_complete_is_refused(tmp_path, caplog):
    model = tiny_model("bert")
    selection = Selection.from_gates(analyze(model), random_gates(analyze(model), 3))
    apply_selection(model, selection).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "classifier.weight"

    def load(**changed):
        save_file({**tensors, **changed}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return load_compact(tmp_path)

    load(extra=torch.ones(1))
    assert "1 tensors have no place in the model, the first is extra" in caplog.text
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \[1, 18\] in its files and \[2, 18\]"):
        load(**{name: tensors[name][:1].clone()})
    del tensors[name]
    with pytest.raises(CheckpointError, match=r"1 weights are not there, the first is classifier\.weight"):
        load()
