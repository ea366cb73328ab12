from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dsprune.cli import main
from dsprune.consolidate import load_compact
from dsprune.consolidate.modeling_dsprune import BlockLinear
from dsprune.errors import ConfigError, OutputError
from dsprune.measure import calibrate as module
from dsprune.measure.calibrate import CURVES, calibrate, matrices_of, store
from dsprune.measure.calibrate_report import Calibration, CurvePoint, break_even
from tests.helpers.blocks import block_model
from tests.helpers.models import tiny_batch, tiny_model

needs_kernel = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch with MKL")
QUICK: dict[str, Any] = {"batch_sizes": [1], "length": 8, "device": "cpu", "runs": 2, "warmup": 0, "threads": 1}


def _calibrate(matrices, **options):
    return calibrate(matrices, **QUICK | {"densities": [0.25, 0.5]} | options)


def _found(gains: dict[float, float], **changes: Any) -> Calibration:
    """As if measured: speedups by density."""
    points = [CurvePoint((64, 64), 8, density, gain, 1.0) for density, gain in gains.items()]
    given = {"device": "a CPU", "threads": 1, "dtype": "float32", "block": (16, 16), "torch": "2", "runs": 3}
    return Calibration(**given | {"margin": 0.0, "points": tuple(points)} | changes)


# --- from curves to thresholds ------------------------------------------------------------------


def test_where_gains_cross_one():
    assert break_even([0.1, 0.2, 0.4], [3.0, 2.0, 0.0]) == pytest.approx(0.3)
    assert break_even([0.1, 0.2], [3.0, 2.0]) == 0.2, "nothing is said beyond what was measured"
    assert break_even([0.1, 0.2], [0.9, 0.5]) == 0
    assert break_even([0.1, 0.2], [1.0, 0.5]) == 0
    assert break_even([0.1, 0.2, 0.3], [1.5, 0.5, 4.0]) == pytest.approx(0.15), "a gain that comes back is noise"
    assert break_even([], []) == 0


def test_the_margin_is_kept():
    assert _found({0.1: 1.05, 0.2: 0.5}).thresholds() == {"64x64": pytest.approx(0.1091, abs=1e-4)}
    assert _found({0.1: 1.05, 0.2: 0.5}, margin=0.1).thresholds() == {"64x64": 0}


def test_the_worst_number_of_tokens_decides():
    few = _found({0.1: 3.0, 0.2: 2.0}).points
    many = [CurvePoint((64, 64), 4096, 0.1, 2.0, 1.0), CurvePoint((64, 64), 4096, 0.2, 0.0, 1.0)]
    other = [CurvePoint((256, 64), 4096, 0.1, 2.0, 1.0)]
    found = _found({}, points=(*few, *many, *other))
    assert found.thresholds() == {"64x64": 0.15, "256x64": 0.1}


def test_the_text_names_what_the_figures_depend_on():
    text = _found({0.1: 2.0, 0.2: 0.5}).render()
    for part in ("a CPU, 1 thread(s), float32, torch 2, blocks of 16 x 16", "64 x 64", "2.00x faster", "2.00x slower"):
        assert part in text
    assert "64 x 64, 8 tokens: BSR pays up to a density of 16.7%" in text
    assert "pays at no density measured" in _found({0.1: 0.5}).render()
    assert "weights run dense" in _found({}).render()
    assert "thread" not in _found({0.1: 2.0}, threads=0).render()


# --- measuring ----------------------------------------------------------------------------------


@needs_kernel
def test_every_case_is_measured():
    found = _calibrate([((64, 48), (16, 16)), ((96, 33), (32, 16)), ((64, 64), (16, 16))], batch_sizes=[1, 2])
    assert [each.block for each in found] == [(16, 16), (32, 16)]
    first = found[0]
    # 64 x 48 and 64 x 64 are of one class.
    assert [(p.shape, p.tokens, p.density) for p in first.points] == [
        ((64, 48), tokens, density) for tokens in (8, 16) for density in (0.25, 0.5)
    ]
    assert all(point.dense_ms > 0 and point.bsr_ms > 0 for each in found for point in each.points)
    assert (first.threads, first.dtype, first.torch, first.runs) == (1, "float32", torch.__version__, 2)
    assert set(first.thresholds()) == {"64x64"}


@needs_kernel
def test_the_two_ways_are_the_two_ways(monkeypatch):
    layouts = []

    def record(modules, x, runs, warmup):
        outputs = [linear(x) for linear in modules]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        layouts.append([linear._prepared.weight.layout for linear in modules])
        return [1.0, 2.0]

    monkeypatch.setattr(module, "_median_ms", record)
    _calibrate([((64, 48), (16, 32))])
    assert layouts == [[torch.strided, torch.sparse_bsr]] * 2


@pytest.mark.filterwarnings("ignore:block-sparse weights run dense")
def test_without_a_kernel_nothing_is_measured():
    found = _calibrate([((64, 48), (16, 16))], dtype="bfloat16")
    assert found[0].points == ()
    assert found[0].thresholds() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrices": []}, "a matrix at least"),
        ({"densities": [0.0]}, "densities above 0"),
        ({"densities": [1.5]}, "densities above 0"),
        ({"densities": []}, "densities above 0"),
        ({"matrices": [((8, 64), (16, 16))]}, "blocks of 16 x 16 are larger than a matrix of 8 x 64"),
        ({"batch_sizes": []}, "no batch sizes"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        _calibrate(**{"matrices": [((64, 64), (16, 16))]} | options)


# --- a model's folder ---------------------------------------------------------------------------


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    tiny_model("bert").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def block_folder(tmp_path: Path) -> Path:
    block_model(folder=tmp_path / "blocks")
    return tmp_path / "blocks"


def test_the_matrices_of_a_dense_model(dense_folder):
    shapes = [(32, 32), (64, 32), (32, 64)]
    assert matrices_of(dense_folder) == [(shape, (side, side)) for shape in shapes for side in (16, 32)]
    assert matrices_of(dense_folder, blocks=[(8, 16)], shapes=[(9, 20)]) == [((9, 20), (8, 16))]


def test_the_matrices_of_a_block_sparse_model(block_folder):
    own = matrices_of(block_folder)
    assert ((64, 32), (16, 16)) in own
    assert ((32, 64), (32, 24)) in own
    assert len(own) == 4
    assert {block for _, block in matrices_of(block_folder, blocks=[(8, 8)])} == {(8, 8)}
    assert {block for _, block in matrices_of(block_folder, shapes=[(99, 99)])} == {(16, 16), (16, 32), (32, 24)}


def test_what_is_no_model_folder_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        matrices_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a model folder"):
        matrices_of(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="does not hold a table"):
        matrices_of(tmp_path)


def test_a_later_measurement_replaces_that_of_the_same_place(block_folder):
    first, again = _found({0.1: 2.0}), _found({0.1: 2.0, 0.2: 1.5})
    elsewhere, wider = _found({0.1: 2.0}, device="another"), _found({0.1: 2.0}, block=(32, 32))
    store(block_folder, [first, elsewhere])
    assert store(block_folder, [again, wider]) == [block_folder / CURVES, block_folder / "config.json"]
    config = json.loads((block_folder / "config.json").read_text())
    assert config["dsprune"]["calibration"] == [each.entry() for each in (elsewhere, again, wider)]
    curves = json.loads((block_folder / CURVES).read_text())["calibrations"]
    assert curves == [each.to_dict() for each in (elsewhere, again, wider)]
    assert curves[1]["points"][0]["speedup"] == 2.0
    assert sorted(path.name for path in block_folder.iterdir() if path.name.startswith(".")) == []


def test_a_dense_model_keeps_its_configuration(dense_folder):
    before = (dense_folder / "config.json").read_text()
    assert store(dense_folder, [_found({0.1: 2.0})]) == [dense_folder / CURVES]
    assert (dense_folder / "config.json").read_text() == before


def test_a_damaged_or_unwritable_folder_is_told(block_folder, monkeypatch):
    (block_folder / CURVES).write_text("{")
    with pytest.raises(ConfigError, match=f"{CURVES} cannot be read"):
        store(block_folder, [_found({0.1: 2.0})])
    (block_folder / CURVES).unlink()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = (block_folder / "config.json").read_text()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        store(block_folder, [_found({0.1: 2.0})])
    assert (block_folder / "config.json").read_text() == before


@needs_kernel
def test_from_the_command_line_to_what_runs(block_folder, capsys, monkeypatch):
    """Measured as ten times faster, all matrices run block-sparse, in the folder as anybody loads it."""
    dense = load_compact(block_folder).eval()
    monkeypatch.setattr(module, "_median_ms", lambda *_: [1.0, 0.1])
    assert main(["bench", "--calibrate", str(block_folder), "--batch", "1", "--length", "8", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "10.00x faster" in printed
    assert f"wrote {block_folder / CURVES} and {block_folder / 'config.json'}" in printed
    model = AutoModelForSequenceClassification.from_pretrained(block_folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_batch())[0], dense(**tiny_batch())[0], rtol=0, atol=1e-5)
    own = [linear for linear in model.modules() if type(linear).__name__ == BlockLinear.__name__]
    assert len(own) == 6
    layouts = [linear._prepared.weight.layout for linear in own if linear.values is not None and linear.density <= 0.6]
    assert layouts
    assert set(layouts) == {torch.sparse_bsr}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "two model folders"),
        (["a"], "two model folders"),
        (["a", "b", "--block", "16x16"], "--block and --shape say what --calibrate"),
        (["a", "b", "--calibrate", "c"], "--calibrate takes one model folder"),
        (["--calibrate", "c", "--json", "d"], "--calibrate takes one model folder"),
        (["--calibrate", "/no/such/folder"], "cannot be read"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 64
    assert message in capsys.readouterr().err


def test_sizes_are_given_as_rows_x_columns(dense_folder, monkeypatch):
    given = {}
    monkeypatch.setattr(module, "matrices_of", lambda folder, **options: given.update(options) or [])
    main(["bench", "--calibrate", str(dense_folder), "--block", "16x32", "32x32", "--shape", "64x48"])
    assert given == {"blocks": [(16, 32), (32, 32)], "shapes": [(64, 48)]}
    with pytest.raises(SystemExit):
        main(["bench", "--calibrate", str(dense_folder), "--block", "16"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(dtype):
    found = _calibrate([((128, 64), (32, 32))], device="cuda", dtype=dtype, threads=None)[0]
    assert found.device == torch.cuda.get_device_name()
    assert found.threads == 0
    assert len(found.points) == 2
