"""Measuring a table through the command that users type, on models that take no time."""

import json
import logging

import pytest
import torch

from dsprune.cli import main
from dsprune.config import parse_config
from dsprune.consolidate import apply_selection
from dsprune.errors import ConfigError
from dsprune.measure.bench import random_inputs
from dsprune.measure.latency import DenseModel, Setting
from dsprune.measure.latency.check import STYLES, Case, CheckReport, draw_gates
from dsprune.measure.latency.obtain import obtain_table, setting_of
from dsprune.measure.latency.points import knots, make_selection, plan_points
from dsprune.methods import method_options
from dsprune.structure import CostModel, Selection, ones
from dsprune.structure.latency import LatencyCost, LatencyTable
from tests.helpers.models import tiny_model
from tests.helpers.selections import random_gates

SMALL = ["--batch", "2", "--length", "8", "--device", "cpu", "--threads", "1", "--minutes", "0.001"]
SETTING = Setting(batch=2, length=8, device="cpu", threads=1, minutes=0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("latency")
    tiny_model("bert").save_pretrained(path / "bert")
    tiny_model("t5").save_pretrained(path / "t5")
    return path


@pytest.fixture(scope="module")
def table(folder):
    """Measured by the command itself."""
    assert main(["latency", str(folder / "bert"), str(folder / "table.json"), *SMALL]) == 0
    return LatencyTable.load(folder / "table.json")


def test_the_command_writes_what_it_measured(table, folder):
    dense = DenseModel.read(str(folder / "bert"))
    table.check(dense.structure, SETTING.conditions(torch.device("cpu")), "table.json")
    assert table.hidden[-1] == 32
    assert set(table.parts) == {"attention", "ffn"}
    assert table.parts["attention"].units[-1] == 4
    assert table.parts["ffn"].units[-1] == 64
    assert table.parts["attention"].widths
    assert table.rounds == 3
    assert table.conditions.torch == torch.__version__
    cost = LatencyCost(dense.structure, table)
    assert 0 < cost.dense < 1000
    assert float(cost.milliseconds({"ffn": torch.zeros(2)})) < cost.dense


def test_a_table_that_is_there_is_checked(table, folder, capsys):
    given = ["latency", str(folder / "bert"), "--table", str(folder / "table.json"), *SMALL]
    assert main([*given, "--check", "4"]) == 0
    text = capsys.readouterr().out
    assert "the dense model: " in text
    assert "4 selections: median error" in text


def test_a_table_of_elsewhere_is_refused_in_one_line(table, folder, capsys):
    given = ["latency", str(folder / "bert"), "--table", str(folder / "table.json"), *SMALL]
    assert main([*given, "--batch", "3", "--dtype", "bf16"]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "dtype float32, not bfloat16; batch 2, not 3" in line


def test_mistakes_are_told_at_once(folder, capsys):
    wrong = ["--runtime", "onnx", "--device", "tpu", "--batch", "0", "--minutes", "0"]
    assert main(["latency", str(folder / "bert"), *wrong]) == 64
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 4
    for word in ("no runtime 'onnx' to measure with: there are torch, compile", "'tpu'", "batch size is 0", "minutes"):
        assert word in text
    assert main(["latency", str(folder / "bert"), *SMALL, "--length", "64"]) == 64
    assert "40 positions" in capsys.readouterr().err
    assert main(["latency", str(folder / "bert"), *SMALL, "--head", "ForNothing"]) == 64
    assert "BertForNothing" in capsys.readouterr().err


def test_an_encoder_decoder_has_a_part_for_each_kind_of_sublayer(folder):
    points = plan_points(DenseModel.read(str(folder / "t5")).structure, 8)
    assert list(dict.fromkeys(point.part for point in points)) == [
        None,
        "encoder attention",
        "encoder ffn",
        "decoder attention",
        "decoder cross",
        "decoder ffn",
    ]


@pytest.mark.parametrize("name", ["bert", "llama", "deberta-v2", "gpt2", "t5"])
def test_what_is_measured_is_what_would_be_exported(name):
    """Same class, same shapes, and it runs: for each point of a table, and for a random selection."""
    model = tiny_model(name)
    dense = DenseModel.of({**model.config.to_dict(), "architectures": [type(model).__name__]})
    where = torch.device("cpu"), torch.float32
    points = [point for point in plan_points(dense.structure, 8) if point.part is not None]
    built = [_shapes(dense.compact(make_selection(dense.structure, point, 1), *where)) for point in points]
    assert len({tuple(shapes) for shapes in built}) == len(points)
    chosen = Selection.from_gates(dense.structure, random_gates(dense.structure, 2), empty="bias")
    ours, exported = dense.compact(chosen, *where), apply_selection(model, chosen)
    assert type(ours).__name__ == type(exported).__name__
    assert _shapes(ours) == _shapes(exported)
    with torch.inference_mode():
        logits = ours(**random_inputs(ours, 2, 8, 0, where[0]))[0]
    assert logits.isfinite().all()


def _shapes(model):
    return [(name, tuple(param.shape)) for name, param in model.named_parameters()]


@pytest.mark.parametrize("style", STYLES)
def test_drawn_selections_have_the_density_that_is_asked_for(style):
    dense = DenseModel.of({**tiny_model("bert").config.to_dict(), "architectures": ["BertForSequenceClassification"]})
    cost = CostModel(dense.structure, empty=STYLES[style])
    for density in (0.1, 0.4, 0.8):
        gates = draw_gates(dense.structure, style, density, 0)
        assert 1 - float(cost.sparsity(gates)) == pytest.approx(density, abs=0.1)
        assert set(gates) == ({"qk_dim", "vo_dim", "ffn_dim"} if style == "ragged" else {*gates})


def test_errors_of_a_check_are_shares_of_what_was_measured():
    cases = tuple(Case("units", 0.5, predicted, 0.2) for predicted in (0.2, 0.21, 0.18))
    report = CheckReport(cases)
    assert report.quantile(0.5) == pytest.approx(0.05)
    assert report.quantile(1.0) == pytest.approx(0.1)
    assert "worst -10.0%" in report.render()


def test_knots_are_odd_but_for_the_dense_size():
    assert knots(384, (1 / 8, 1 / 2, 1)) == (1, 49, 193, 384)
    assert knots(12, (1 / 4, 1 / 2, 1), odd=False) == (1, 3, 6, 12)
    assert knots(1, (1 / 2, 1)) == (1,)


def _config(folder, **latency):
    tree = {
        "output": str(folder / "run"),
        "model": {"name": str(folder / "bert")},
        "task": {"name": "order", "max_length": 8},
        "eval": {"bench_batch": 2},
        "latency": {"device": "cpu", "threads": 1, "minutes": 0.001, **latency},
    }
    return parse_config(tree, method_options)


def test_a_run_takes_the_table_of_its_recipe_or_measures_one(table, folder, tmp_path, caplog):
    dense = DenseModel.read(str(folder / "bert"))
    assert setting_of(_config(folder)) == SETTING
    measured = obtain_table(_config(folder), dense, tmp_path / "kept.json")
    assert obtain_table(_config(folder), dense, tmp_path / "kept.json") == measured
    assert obtain_table(_config(folder, table=str(folder / "table.json")), dense, tmp_path / "no.json") == table
    # A job that goes on elsewhere measures anew.
    again = obtain_table(_config(folder, batch=3), dense, tmp_path / "kept.json")
    assert again.conditions.batch == 3
    foreign = {"table": str(folder / "table.json"), "batch": 3}
    with pytest.raises(ConfigError, match=r"batch 2, not 3\): measure one here .* latency\.allow_foreign"):
        obtain_table(_config(folder, **foreign), dense, tmp_path / "no.json")
    with caplog.at_level(logging.WARNING):
        assert obtain_table(_config(folder, **foreign, allow_foreign=True), dense, tmp_path / "no.json") == table
    assert "is foreign, and taken all the same: batch 2, not 3" in caplog.text
    assert not (tmp_path / "no.json").exists()


def test_compact_models_have_no_table(folder, tmp_path):
    model = tiny_model("bert")
    dense = DenseModel.of({**model.config.to_dict(), "architectures": ["BertForSequenceClassification"]})
    gates = ones(dense.structure, ("ffn_dim",))
    gates["ffn_dim"][0, 3:] = 0
    apply_selection(model, Selection.from_gates(dense.structure, gates)).save_pretrained(tmp_path)
    assert "dsprune" in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ConfigError, match="is a compact model"):
        DenseModel.read(str(tmp_path))
