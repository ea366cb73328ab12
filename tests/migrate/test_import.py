"""Models of the authors' own code: what they compute is what the imported folder computes."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from dsprune.cli import main
from dsprune.consolidate import load_compact
from dsprune.errors import ArchitectureError, CheckpointError, ConfigError, DspruneError, OutputError
from dsprune.migrate import Origin, adopt
from tests.helpers.folders import tiny_tokenizer
from tests.helpers.stranger import run_stranger
from tests.migrate import reference
from tests.migrate.reference import batch, cofi_config, cofi_cut, cofi_logits, cofi_masks, random_model, write_folder

CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def _state(base="bert"):
    return {name: tensor.clone() for name, tensor in random_model(base).state_dict().items()}


@torch.no_grad()
def _imported(folder, padding=0):
    return load_compact(folder).eval()(**batch(padding)).logits


def _stock(state, **changes):
    """The stock model with these weights, as whose masked form theirs computes."""
    model = BertForSequenceClassification(BertConfig(**{**reference.SIZES, **changes})).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(**batch()).logits


@pytest.mark.parametrize(("seed", "soft"), [(0, False), (1, True), (2, True)])
def test_cofi_with_masks(tmp_path, seed, soft):
    state, masks, config = _state(), cofi_masks(seed, soft=soft), cofi_config()
    write_folder(tmp_path / "their", config, state, zs=masks, l0_module={"never": "read"})
    report = adopt("cofi", Origin(str(tmp_path / "their")), tmp_path / "out")
    torch.testing.assert_close(_imported(tmp_path / "out"), cofi_logits(config, state, masks, batch()), **CLOSE)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["dsprune"]
    assert facts["method"] == "cofi"
    assert facts["hidden"] == int((masks["hidden_z"] != 0).sum())
    assert [layer["source"] for layer in facts["layers"]] == [0, 2]
    assert report.parameters == sum(p.numel() for p in load_compact(tmp_path / "out").parameters())
    assert "pruned by the code of the authors of `cofi`" in (tmp_path / "out" / "README.md").read_text()


def test_cofi_masks_of_some_kinds_only_and_safetensors(tmp_path):
    state, config = _state(), cofi_config()
    masks = {name: mask for name, mask in cofi_masks(4, soft=True).items() if name in ("head_z", "intermediate_z")}
    folder = write_folder(tmp_path / "their", config, state, zs=masks)
    (folder / "pytorch_model.bin").unlink()
    save_file(state, folder / "model.safetensors")
    adopt("cofi", Origin(str(folder)), tmp_path / "out")
    torch.testing.assert_close(_imported(tmp_path / "out"), cofi_logits(config, state, masks, batch()), **CLOSE)


@pytest.mark.parametrize("base", ["bert", "roberta"])
def test_cofi_with_weights_that_are_cut(tmp_path, base):
    state, config, padding = _state(base), cofi_config(base), int(base == "roberta")
    cut = cofi_cut(state, cofi_masks(5, soft=False), base)
    write_folder(tmp_path / "their", config, cut)
    report = adopt("cofi", Origin(str(tmp_path / "their")), tmp_path / "out")
    expected = cofi_logits(config, cut, {}, batch(padding))
    torch.testing.assert_close(_imported(tmp_path / "out", padding), expected, **CLOSE)
    norms = [name for name in cut if "LayerNorm" in name and len(cut[name]) == reference.HIDDEN]
    dropped = ("layer_transformation", "position_ids")
    kept = sum(t.numel() for name, t in cut.items() if name not in norms and not any(d in name for d in dropped))
    assert report.parameters == kept


def test_cofi_cut_and_masked_are_one_model(tmp_path):
    """A sublayer that hard masks leave without units is gone, whatever its own mask says."""
    state, config, masks = _state(), cofi_config(), cofi_masks(6, soft=False)
    masks["head_z"][0] = 0
    masks["intermediate_z"][0] = 0
    write_folder(tmp_path / "masked", config, state, zs=masks)
    gone = masks | {"head_layer_z": masks["head_layer_z"].clone(), "mlp_z": masks["mlp_z"].clone()}
    gone["head_layer_z"][0] = gone["mlp_z"][0] = 0
    write_folder(tmp_path / "cut", config, cofi_cut(state, gone))
    for name in ("masked", "cut"):
        adopt("cofi", Origin(str(tmp_path / name)), tmp_path / f"{name}-out")
    torch.testing.assert_close(_imported(tmp_path / "masked-out"), _imported(tmp_path / "cut-out"), **CLOSE)


@pytest.mark.parametrize(("units", "rank"), [("dims", None), ("dims", 8), ("heads", None)])
def test_grain(tmp_path, units, rank):
    """Neither configuration nor tokenizer lie beside their states."""
    state = reference.grain_state(_state(), 7, units=units, rank=rank)
    (tmp_path / "their").mkdir()
    torch.save(state, tmp_path / "their" / "gs200.pt")
    old = {key: value for key, value in reference.SIZES.items() if key != "num_labels"}
    (tmp_path / "teacher.json").write_text(json.dumps(old))
    origin = Origin(str(tmp_path / "their" / "gs200.pt"), config=str(tmp_path / "teacher.json"), labels=("a", "b", "c"))
    report = adopt("grain", origin, tmp_path / "out")
    dense = reference.masked(state)
    if rank is not None:
        table, projection = (dense.pop(f"bert.embeddings.{n}.weight") for n in ("word_embeddings", "proj"))
        dense["bert.embeddings.word_embeddings.weight"] = table @ projection.T
    torch.testing.assert_close(_imported(tmp_path / "out"), _stock(dense), **CLOSE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert config["dsprune"]["empty"] == "bias"
    assert config["dsprune"]["embedding_rank"] == rank
    assert report.encoder_sparsity > 0.3


def test_mlpruning(tmp_path):
    thresholds = {"head": 0.1, "attention.output.dense": 0.4, "intermediate.dense": -1.0, "output.dense": 1.0}
    state = reference.mlpruning_state(_state(), 8, thresholds)
    config = {**cofi_config(), "model_type": "masked_bert", "head_pruning": True, "pruning_method": "topK"}
    config["architectures"] = ["MaskedBertForSequenceClassification"]
    folder = write_folder(tmp_path / "their", config, state)
    tiny_tokenizer().save_pretrained(folder)
    adopt("mlpruning", Origin(str(folder)), tmp_path / "out")
    torch.testing.assert_close(_imported(tmp_path / "out"), _stock(reference.mlpruning_masked(state)), **CLOSE)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Ben is older.")["input_ids"][0] == 2


def test_mlprunings_second_step(tmp_path):
    thresholds = {"head": 0.1, "attention.output.dense": 0.4, "intermediate.dense": -0.2, "output.dense": 1.0}
    first = reference.mlpruning_state(_state(), 8, thresholds)
    config = {**cofi_config(), "model_type": "masked_bert", "architectures": ["MaskedBertForSequenceClassification"]}
    write_folder(tmp_path / "first", config, first)
    state, dense = reference.mlpruning_second(first, 9, (8, 4), -0.3)
    write_folder(tmp_path / "second", config, state)
    words = ["import", "mlpruning", str(tmp_path / "second"), str(tmp_path / "out")]
    assert main([*words, "--first-step", str(tmp_path / "first"), "--block", "8x4"]) == 0
    torch.testing.assert_close(_imported(tmp_path / "out"), _stock(dense), **CLOSE)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["dsprune"]
    assert facts["layers"][0]["blocks"]["intermediate.dense"]["block"] == [8, 4]
    for origin, kind, message in (
        (Origin(str(tmp_path / "second")), CheckpointError, "--first-step"),
        (Origin(str(tmp_path / "second"), first_step=str(tmp_path / "first")), ConfigError, "belong together"),
        (Origin(str(tmp_path / "second"), first_step=str(tmp_path / "first"), block=(4, 4)), CheckpointError, "scores"),
        (Origin(str(tmp_path / "second"), first_step=str(tmp_path / "first"), block=(8, 6)), CheckpointError, "whole"),
    ):
        with pytest.raises(kind, match=message):
            adopt("mlpruning", origin, tmp_path / "other")


LOAD = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
folder, inputs, out = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**load_file(inputs)).logits, out)
"""


def test_the_command_and_plain_transformers(tmp_path, capsys):
    state, masks, config = _state(), cofi_masks(1, soft=True), cofi_config()
    write_folder(tmp_path / "their", config, state, zs=masks)
    names = ["contradiction", "entailment", "neutral"]
    assert main(["import", "cofi", str(tmp_path / "their"), str(tmp_path / "out"), "--labels", *names]) == 0
    assert "masked and compact logits differ by at most" in capsys.readouterr().out
    assert list(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label.values()) == names
    save_file(batch(), tmp_path / "inputs.safetensors")
    run_stranger(LOAD, tmp_path, *(tmp_path / name for name in ("out", "inputs.safetensors", "logits.pt")))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), cofi_logits(config, state, masks, batch()), **CLOSE)


class Opened:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return (open, ("/nowhere/at/all", "w"))


def _cofi(folder, masks=None, state=None, **config):
    masks = cofi_masks(0, soft=False) if masks is None else masks
    return write_folder(folder, {**cofi_config(), **config}, _state() if state is None else state, zs=masks)


@pytest.mark.parametrize(
    ("method", "damage", "kind", "message"),
    [
        ("cofi", lambda f: (f / "pytorch_model.bin").unlink(), ConfigError, "holds no weights"),
        ("cofi", lambda f: (f / "config.json").unlink(), ConfigError, "--config"),
        ("cofi", lambda f: (f / "config.json").write_text("{"), ConfigError, "cannot be read"),
        ("cofi", lambda f: (f / "zs.pt").unlink(), CheckpointError, "there is no zs.pt"),
        ("cofi", lambda f: torch.save(Opened(), f / "zs.pt"), CheckpointError, "never done"),
        ("cofi", lambda f: torch.save(None, f / "zs.pt"), CheckpointError, "but nothing"),
        ("cofi", lambda f: torch.save({"head_z": 3}, f / "zs.pt"), CheckpointError, "a int as 'head_z'"),
        ("cofi", lambda f: torch.save({"z": torch.ones(3)}, f / "zs.pt"), CheckpointError, "CoFi's are head_z"),
        ("cofi", lambda f: torch.save({"mlp_z": torch.ones(12)}, f / "zs.pt"), CheckpointError, "would be"),
        ("cofi", lambda f: torch.save({"hidden_z": torch.zeros(32)}, f / "zs.pt"), ConfigError, "no hidden dimension"),
        ("cofi", lambda f: (f / "pytorch_model.bin").write_bytes(b"PK"), CheckpointError, "it is damaged"),
        ("grain", lambda f: None, CheckpointError, "holds no masks"),
        ("mlpruning", lambda f: None, CheckpointError, "holds no scores"),
        ("cofi", lambda f: (f.parent / "out").mkdir() or (f.parent / "out" / "x").touch(), OutputError, "not empty"),
    ],
)
def test_mistakes(tmp_path, method, damage, kind, message):
    damage(_cofi(tmp_path / "their"))
    with pytest.raises(kind, match=message) as caught:
        adopt(method, Origin(str(tmp_path / "their")), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


def _lacking(state):
    del state["bert.pooler.dense.bias"]


def _foreign(state):
    state["bert.encoder.layer.0.adapter.weight"] = torch.ones(2)


def _other_head(state):
    del state["classifier.weight"]


def _other_model(state):
    for name in list(state):
        state[name.replace("bert.", "model.")] = state.pop(name)


def _unlike(state):
    name = "bert.encoder.layer.2.intermediate.dense.weight"
    state[name] = state[name][:5]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_lacking, CheckpointError, "lacks bert.pooler.dense.bias"),
        (_foreign, CheckpointError, "adapter"),
        (_other_head, ArchitectureError, "no head of a task"),
        (_other_model, ArchitectureError, "expected a BERT or RoBERTa"),
        (_unlike, CheckpointError, "beside the other weights it would be"),
    ],
)
def test_weights_of_something_else(tmp_path, change, kind, message):
    state = _state()
    change(state)
    _cofi(tmp_path / "their", state=state)
    with pytest.raises(kind, match=message):
        adopt("cofi", Origin(str(tmp_path / "their")), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert.encoder.layer.0.output.dense.weight_mask", "whole units"),
        ("bert.encoder.layer.0.attention.self.key.weight_mask", "unlike masks"),
    ],
)
def test_grain_masks_that_are_none(tmp_path, name, message):
    state = reference.grain_state(_state(), 7)
    mask = state[name].clone()
    state[name] = (1 - mask) if "key" in name else mask.index_put((torch.tensor(0), torch.tensor(0)), 1 - mask[0, 0])
    if "key" in name:
        state[name.replace("weight", "bias")] = 1 - mask[:, 0]
    write_folder(tmp_path / "their", cofi_config(), state)
    with pytest.raises(CheckpointError, match=message):
        adopt("grain", Origin(str(tmp_path / "their")), tmp_path / "out")


def test_several_files_are_told(tmp_path):
    state = _state()
    folder = write_folder(tmp_path / "their", cofi_config(), state)
    (folder / "pytorch_model.bin").unlink()
    for step in (1, 2):
        torch.save(state, folder / f"gs{step}.pt")
    with pytest.raises(ConfigError, match=r"gs1\.pt and gs2\.pt"):
        adopt("grain", Origin(str(folder)), tmp_path / "out")
    with pytest.raises(ConfigError, match="does not exist"):
        adopt("grain", Origin(str(tmp_path / "nowhere")), tmp_path / "out")
    with pytest.raises(DspruneError, match="names 2 classes"):
        adopt("grain", Origin(str(folder / "gs1.pt"), labels=("a", "b")), tmp_path / "out")
