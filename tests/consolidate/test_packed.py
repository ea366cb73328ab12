"""Ragged heads in the compact model: what is stored, and what runs."""

import pytest
import torch

from dsprune.consolidate import apply_selection, load_compact
from dsprune.consolidate.modeling_dsprune import Constant
from dsprune.structure import Selection, analyze, attach_gates, ones
from tests.helpers.models import tiny_batch, tiny_model


def _ragged(gates):
    gates["qk_dim"][0, 3:8] = 0
    gates["vo_dim"][0, 8:13] = 0
    return gates


def _compact(gates=None, **options):
    model = tiny_model("bert")
    structure = analyze(model)
    gates = _ragged(ones(structure)) if gates is None else gates(ones(structure))
    return apply_selection(model, Selection.from_gates(structure, gates, empty="bias"), **options)


def test_heads_are_padded_around_what_is_stored_and_computed():
    attention = _compact().bert.encoder.layer[0].attention
    for linear, shape in [
        (attention.self.query, (27, 32)),
        (attention.self.value, (27, 32)),
        (attention.output.dense, (32, 27)),
    ]:
        assert type(linear) is torch.nn.Linear
        assert linear.weight.shape == (linear.out_features, linear.in_features) == shape
    assert attention.self.attention_head_size == 8
    assert attention.self.packing.query_output.width == 32
    assert attention.output.packing.dense_input.width == 32


def test_the_scale_stays_that_of_the_dense_head():
    def thin(gates):
        for kind in ("qk_dim", "vo_dim"):
            gates[kind].view(2, 4, 8)[..., 2:] = 0
        return gates

    attention = _compact(thin, head_multiple=1).bert.encoder.layer[0].attention.self
    assert attention.attention_head_size == 2
    assert attention.scaling == 8**-0.5
    # Heads of one size need no packing, whatever the size.
    assert type(attention.query) is torch.nn.Linear


@pytest.mark.parametrize("name", ["deberta-v2", "deberta-v2-unshared", "deberta-span", "deberta-base"])
@pytest.mark.parametrize("multiple", [1, 3, 12])
def test_scores_that_are_scaled_by_the_size_of_heads_stay_those_of_the_dense_head(name, multiple):
    """Thinner heads and wider ones than the dense head, of any products of tokens with positions."""
    model = tiny_model(name, dtype=torch.float64)
    structure = analyze(model)
    gates = ones(structure, dtype=torch.float64)
    for kind in ("qk_dim", "vo_dim"):
        gates[kind].view(2, 4, 8)[:, :, 5:] = 0
        gates[kind].view(2, 4, 8)[1, 2, 1:] = 0
        gates[kind][0] *= 0.7
    selection = Selection.from_gates(structure, gates, empty="bias")
    compact = apply_selection(model, selection, head_multiple=multiple)
    base = getattr(compact, "deberta", compact)
    assert base.encoder.layer[0].attention.self.attention_head_size == {1: 5, 3: 6, 12: 12}[multiple]
    gating = attach_gates(model, structure, empty="bias")
    gating.set({kind: gate.double() for kind, gate in selection.gates.items()})
    with torch.no_grad():
        torch.testing.assert_close(compact(**tiny_batch())[0], model(**tiny_batch())[0], rtol=0, atol=1e-10)


def test_heads_are_padded_to_the_multiple_that_was_asked_for():
    def thin(gates):
        for kind in ("qk_dim", "vo_dim"):
            gates[kind].view(2, 4, 8)[..., 3:] = 0
        return gates

    sizes = {
        multiple: _compact(thin, head_multiple=multiple).bert.encoder.layer[0].attention.self.attention_head_size
        for multiple in (1, 2, 4, 16)
    }
    assert sizes == {1: 3, 2: 4, 4: 4, 16: 16}


def test_what_has_no_weights_is_not_stored():
    def hollow(gates):
        gates["qk_dim"][0] = 0
        gates["vo_dim"][1] = 0
        gates["ffn_dim"][1] = 0
        return gates

    first, second = _compact(hollow).bert.encoder.layer
    assert not hasattr(first.attention.self, "query")
    assert first.attention.self.packing.absent == {"query": 32, "key": 32}
    assert isinstance(second.attention.output.dense, Constant)
    assert isinstance(second.output.dense, Constant)
    names = [name for name, _ in second.named_parameters()]
    assert names == [
        "attention.output.dense.bias",
        "attention.output.LayerNorm.weight",
        "attention.output.LayerNorm.bias",
        "output.dense.bias",
        "output.LayerNorm.weight",
        "output.LayerNorm.bias",
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_attention_implementation_runs_packed_heads(attention, tmp_path):
    compact = _compact()
    compact.save_pretrained(tmp_path)
    loaded = load_compact(tmp_path, attn_implementation=attention).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tiny_batch())[0], compact(**tiny_batch())[0], rtol=0, atol=1e-5)


def test_what_served_in_inference_can_be_trained():
    compact = _compact()
    with torch.inference_mode():
        before = compact(**tiny_batch()).logits
    compact(**tiny_batch(), labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    assert compact.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    torch.testing.assert_close(compact(**tiny_batch()).logits.detach(), before.clone())


def test_packed_weights_learn():
    compact = _compact().train()
    compact(**tiny_batch(), labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    for name, param in compact.named_parameters():
        assert param.grad is not None, name
        assert param.grad.abs().sum() > 0 or "token_type" in name or "key.bias" in name, name


def test_a_factored_embedding_is_stored_as_its_factors(tmp_path):
    model = tiny_model("bert", embedding_rank=5)
    structure = analyze(model)
    assert structure.embedding_rank == 5
    assert structure.factored_away == 50 * 32 - 50 * 5 - 5 * 32
    compact = apply_selection(model, Selection.from_gates(structure, ones(structure)))
    compact.save_pretrained(tmp_path)
    loaded = load_compact(tmp_path).eval()
    assert loaded.bert.embeddings.word_embeddings.table.weight.shape == (50, 5)
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch())[0], compact(**tiny_batch())[0])
    counted = loaded.config.dsprune["parameters"]
    assert counted["dense_total"] == sum(param.numel() for param in tiny_model("bert").parameters())
    assert counted["total"] == sum(param.numel() for param in loaded.parameters())
