import pytest
import torch

from dsprune.errors import CheckpointError, ConfigError
from dsprune.structure import Selection, analyze, ones
from tests.helpers.models import tiny_model
from tests.helpers.selections import random_gates


def test_round_trip(tmp_path):
    structure = analyze(tiny_model("bert"))
    selection = Selection.from_gates(structure, random_gates(structure, 3, soft=True), empty="bias")
    selection.save(tmp_path / "s.safetensors", step=7)
    loaded = Selection.load(tmp_path / "s.safetensors")
    assert loaded.empty == "bias"
    assert all(torch.equal(loaded.gates[kind], gate) for kind, gate in selection.gates.items())


def test_units_of_a_removed_sublayer_are_gone():
    structure = analyze(tiny_model("bert"))
    gates = ones(structure)
    gates["attn"][1] = 0
    gates["head"][0, 2] = 0
    selection = Selection.from_gates(structure, gates)
    heads = [len(selection.kept(sublayer.units)) for sublayer in structure.sublayers_of("attn")]
    assert heads == [24, 0]
    assert not selection.alive("attn", 1)
    assert selection.layer_sizes(structure) == [
        {"heads": 3, "kept_heads": [0, 1, 3], "ffn_dim": 64},
        {"heads": 0, "kept_heads": [], "ffn_dim": 64},
    ]


def test_dimensions_go_with_their_head_and_are_told_head_by_head():
    structure = analyze(tiny_model("bert"))
    gates = ones(structure)
    gates["qk_dim"][0, :5] = 0  # five of the first head's eight queries
    gates["vo_dim"][0, 8:16] = 0  # the second head has no values left
    gates["vo_dim"][1, 30:] = 0
    selection = Selection.from_gates(structure, gates)
    queries = structure.sublayers_of("attn")[0].queries
    assert selection.kept(queries).tolist() == [5, 6, 7, *range(16, 32)]
    assert selection.layer_sizes(structure) == [
        {"heads": 3, "kept_heads": [0, 2, 3], "qk_dims": [3, 8, 8], "vo_dims": [8, 8, 8], "ffn_dim": 64},
        {"heads": 4, "qk_dims": [8, 8, 8, 8], "vo_dims": [8, 8, 8, 6], "ffn_dim": 64},
    ]


def test_rows_are_told_as_bits_of_the_kept_hidden_dimensions():
    structure = analyze(tiny_model("bert"))
    gates = ones(structure)
    gates["hidden"][8:] = 0
    gates["attn_row"][0, [1, 2, 3, 20]] = 0
    selection = Selection.from_gates(structure, gates)
    first, second = selection.layer_sizes(structure)
    assert first == {"heads": 4, "attn_rows": f"{0b10001111:x}", "ffn_dim": 64}
    assert second == {"heads": 4, "ffn_dim": 64}


def test_impossible_selections_are_refused():
    structure = analyze(tiny_model("bert"))
    with pytest.raises(ConfigError, match="no hidden dimension is left"):
        Selection.from_gates(structure, {"hidden": torch.zeros(32)})
    with pytest.raises(ConfigError, match="no row of the pooler is left"):
        Selection.from_gates(structure, {"pooler": torch.zeros(32)})
    with pytest.raises(ConfigError, match="not finite"):
        Selection.from_gates(structure, {"attn": torch.tensor([1.0, float("nan")])})


def test_a_damaged_file_is_one_clear_error(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot read the selection"):
        Selection.load(tmp_path / "s.safetensors")


def test_a_selection_from_before_poolers_had_gates_keeps_all_of_the_pooler(tmp_path):
    structure = analyze(tiny_model("bert"))
    gates = random_gates(structure, 1)
    older = Selection({kind: gate for kind, gate in gates.items() if kind != "pooler"}, "identity")
    older.save(tmp_path / "selection.safetensors")
    again = Selection.load(tmp_path / "selection.safetensors")
    assert len(again.kept(structure.pooler)) == structure.sizes.pooler
    assert torch.equal(again.kept(structure.hidden), older.kept(structure.hidden))
