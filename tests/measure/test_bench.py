import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dsprune.consolidate import apply_blocks, apply_selection
from dsprune.errors import ConfigError, OutputError
from dsprune.measure.bench import bench_models, count_macs
from dsprune.measure.bench_report import BenchReport, describe_speedup
from dsprune.structure import BlockSelection, CostModel, Selection, analyze, analyze_blocks, ones
from tests.helpers.models import DISTIL_SIZES, SIZES, tiny_model

LENGTH = 16


def _save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense tiny BERT and one with half the FFN and half the layers."""
    root = tmp_path_factory.mktemp("models")
    small = BertConfig(**SIZES | {"intermediate_size": 32, "num_hidden_layers": 1})
    return (
        _save(tiny_model("bert"), root / "dense"),
        _save(BertForSequenceClassification(small), root / "compact"),
    )


@pytest.fixture(scope="module")
def report(folders: tuple[Path, Path]) -> BenchReport:
    return bench_models(*folders, batch_sizes=[1, 3], length=LENGTH, device="cpu", runs=4, warmup=1, threads=1)


def _bench(dense: str | Path, compact: str | Path, **options: Any) -> BenchReport:
    given = {"batch_sizes": [1], "length": LENGTH, "device": "cpu", "runs": 1, "warmup": 0}
    return bench_models(dense, compact, **given | options)


def test_figures_of_the_models_agree_with_the_cost_model(report: BenchReport) -> None:
    dense = tiny_model("bert")
    cost = CostModel(analyze(dense))
    assert report.dense.parameters == cost.dense("total")
    assert report.dense.encoder_parameters == cost.dense("encoder")
    assert report.dense.macs == int(cost.macs({}, length=LENGTH))
    buffers = sum(buffer.nbytes for buffer in dense.buffers())
    assert report.dense.weight_bytes == 4 * report.dense.parameters + buffers
    assert report.compact.parameters < report.dense.parameters
    assert report.compact.encoder_parameters == (4 * 32 * 32 + 4 * 32) + (2 * 32 * 32 + 64) + 4 * 32


@pytest.mark.parametrize(
    "family", ["roberta", "distilbert", "electra", "electra-projected", "deberta-v2", "deberta-v2-unshared"]
)
def test_macs_and_encoder_of_every_family(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    cost = CostModel(analyze(model))
    assert count_macs(model, 11) == int(cost.macs({}, length=11))
    folder = _save(model, tmp_path)
    assert _bench(folder, folder).compact.encoder_parameters == cost.dense("encoder")


def test_derived_figures_are_consistent(report: BenchReport) -> None:
    assert [row.batch_size for row in report.rows] == [1, 3]
    for row in report.rows:
        assert row.mac_ratio == report.dense.macs / report.compact.macs
        assert row.speedup == pytest.approx(row.dense_ms / row.compact_ms)
        assert row.achieved == pytest.approx(row.speedup / row.mac_ratio)
        for timing in (row.dense, row.compact):
            assert 0 < timing.p10_ms <= timing.latency_ms <= timing.p90_ms
            assert timing.sentences_per_s == pytest.approx(1000 * row.batch_size / timing.latency_ms)
            assert timing.tokens_per_s == pytest.approx(LENGTH * timing.sentences_per_s)
        assert row.dense.peak_bytes is None or row.dense.peak_bytes >= report.dense.weight_bytes


def test_models_run_in_turn_on_the_same_full_length_input(folders: tuple[Path, Path], monkeypatch: Any) -> None:
    calls: list[tuple[int, dict[str, torch.Tensor]]] = []
    forward = BertForSequenceClassification.forward

    def spy(self: Any, **inputs: torch.Tensor) -> Any:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        calls.append((self.config.num_hidden_layers, inputs))
        return forward(self, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", spy)
    monkeypatch.setattr("dsprune.measure.bench.count_macs", lambda model, length: 1)
    _bench(*folders, batch_sizes=[16], runs=2, warmup=1)
    assert [layers for layers, _ in calls[:6]] == [2, 1] * 3
    ids = calls[0][1]["input_ids"]
    assert ids.shape == (16, LENGTH)
    assert not (ids == 0).any(), "the padding id"
    for _, inputs in calls:
        assert torch.equal(inputs["input_ids"], ids)
        assert bool((inputs["attention_mask"] == 1).all())


def test_medians_and_spread_leave_the_warm_up_out(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([90.0, 90.0, *(second for i in range(1, 12) for second in (float(i), i / 4))])
    monkeypatch.setattr("dsprune.measure.bench._time", lambda model, inputs: next(clock))
    row = _bench(*folders, runs=11, warmup=1, batch_sizes=[8]).rows[0]
    assert (row.dense.p10_ms, row.dense.latency_ms, row.dense.p90_ms) == (2000, 6000, 10000)
    assert (row.compact.p10_ms, row.compact.latency_ms, row.compact.p90_ms) == (500, 1500, 2500)
    assert row.speedup == 4
    assert row.dense.sentences_per_s == pytest.approx(8 / 6)


def test_the_number_of_threads_is_restored(folders: tuple[Path, Path]) -> None:
    before = torch.get_num_threads()
    assert _bench(*folders, threads=before + 1).threads == before + 1
    assert torch.get_num_threads() == before


def test_bfloat16_halves_the_weights(report: BenchReport, folders: tuple[Path, Path]) -> None:
    halved = _bench(*folders, dtype="bfloat16")
    assert halved.dense.weight_bytes - report.dense.weight_bytes == -2 * report.dense.parameters


def test_json_round_trip(report: BenchReport, tmp_path: Path) -> None:
    report.to_json(tmp_path / "bench.json")
    read = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(report.to_dict()))
    assert read["rows"][1]["speedup"] == report.rows[1].speedup
    assert read["rows"][1]["achieved"] == report.rows[1].achieved
    assert read["dense"]["macs"] == report.dense.macs
    assert read["versions"]["torch"] == torch.__version__
    assert {"device", "dtype", "length", "runs", "warmup", "threads", "seed", "memory"} <= read.keys()


def test_json_that_cannot_be_written(report: BenchReport, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the figures"):
        report.to_json(tmp_path / "missing" / "bench.json")


@pytest.mark.parametrize(
    ("speedup", "words"),
    [(2.314, "2.31x faster"), (0.5, "2.00x slower"), (1.004, "as fast"), (0.996, "as fast"), (0.99, "1.01x slower")],
)
def test_slower_is_called_slower(speedup: float, words: str) -> None:
    assert describe_speedup(speedup) == words


def test_rendering_names_all_that_the_figures_depend_on(report: BenchReport) -> None:
    row = report.rows[0]
    slow = replace(row, compact=replace(row.compact, latency_ms=2 * row.dense_ms), mac_ratio=4.0)
    text = replace(report, rows=(slow,), device="Some CPU, 1 thread(s)").render()
    assert "2.00x slower" in text
    assert "speedup" not in text
    timings = next(line for line in text.splitlines() if line.strip().startswith("compact") and "slower" in line)
    assert timings.split()[-1] == "12%"
    for fact in ("Some CPU", "float32", f"{LENGTH} tokens", "median of 4", torch.__version__, report.memory):
        assert fact in text
    assert f"{report.dense.parameters:,}" in text


def test_unmeasured_memory_is_a_dash(report: BenchReport) -> None:
    row = report.rows[0]
    bare = replace(row, dense=replace(row.dense, peak_bytes=None), compact=replace(row.compact, peak_bytes=None))
    assert " -\n" in replace(report, rows=(bare,)).render()


def _half_model(folder: Path) -> Path:
    _save(tiny_model("bert"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return folder


def _without_config(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _broken_config(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{", encoding="utf-8")
    return folder


BAD_MODELS = {
    "no config.json": (_without_config, "is not a model folder: it has no config.json"),
    "no such folder": (lambda folder: folder, "there is no model folder"),
    "broken config": (_broken_config, "cannot load model"),
    "broken weights": (_half_model, "cannot load model"),
    "language model": (lambda folder: _save(BertForMaskedLM(BertConfig(**SIZES)), folder), "'BertForMaskedLM'"),
    "other vocabulary": (
        lambda folder: _save(BertForSequenceClassification(BertConfig(**SIZES | {"vocab_size": 51})), folder),
        "50 tokens and .* 51 tokens: the two must read the same input",
    ),
    "few positions": (
        lambda folder: _save(
            BertForSequenceClassification(BertConfig(**SIZES | {"max_position_embeddings": 9})), folder
        ),
        f"length {LENGTH} is more than the 9 positions",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_one_line(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    make, message = BAD_MODELS[case]
    with pytest.raises(ConfigError, match=message) as caught:
        _bench(folders[0], make(tmp_path / "model"))
    assert "\n" not in str(caught.value)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float8"}, "unknown dtype 'float8': there are float32, bfloat16, float16"),
    "float16 on CPU": ({"dtype": "float16"}, "float16 on a CPU"),
    "device": ({"device": "tpu"}, "unknown device 'tpu'"),
    "no such GPU": ({"device": "cuda:99"}, "'cuda:99' is not there"),
    "no batch": ({"batch_sizes": []}, "no batch sizes"),
    "batch of none": ({"batch_sizes": [4, 0]}, "batch size is 0"),
    "no runs": ({"runs": 0}, "runs is 0"),
    "negative warm-up": ({"warmup": -1}, "warmup is -1"),
    "no tokens": ({"length": 0}, "length is 0"),
    "no threads": ({"threads": 0}, "threads is 0"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_told_before_any_model_is_loaded(case: str) -> None:
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ConfigError, match=message):
        _bench(Path("/no/such/folder"), Path("/no/such/folder"), **options)


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"'cuda' is not there: .* 0 GPU"):
        _bench("a", "b", device="cuda")


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        _bench("a", "b", runs=0, dtype="int8", length=0)
    assert len(caught.value.mistakes) == 3


def test_roberta_holds_fewer_tokens_than_it_has_positions(tmp_path: Path) -> None:
    folder = _save(RobertaForSequenceClassification(RobertaConfig(**SIZES)), tmp_path)
    _bench(folder, folder, length=38)
    with pytest.raises(ConfigError, match="length 39 is more than the 38 positions"):
        _bench(folder, folder, length=39)


def test_code_in_a_local_folder_is_run(tmp_path: Path) -> None:
    """A folder with `auto_map` brings its own class, which transformers does not know."""
    code = """
from transformers import DistilBertConfig, DistilBertForSequenceClassification

class OwnConfig(DistilBertConfig):
    model_type = "of-its-own"

class OwnForSequenceClassification(DistilBertForSequenceClassification):
    config_class = OwnConfig
"""
    folder = _save(DistilBertForSequenceClassification(DistilBertConfig(**DISTIL_SIZES)), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {
        "model_type": "of-its-own",
        "architectures": ["OwnForSequenceClassification"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling_own.py").write_text(code, encoding="utf-8")
    assert _bench(folder, folder).compact.architecture == "OwnForSequenceClassification"


@pytest.mark.parametrize("name", ["base", "token", "span"])
def test_every_head_is_loaded_as_its_class(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    folder = _save(model, tmp_path)
    assert _bench(folder, folder).dense.architecture == type(model).__name__


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(folders: tuple[Path, Path], dtype: str) -> None:
    report = _bench(*folders, device=None, dtype=dtype, runs=3, warmup=1)
    assert report.device == torch.cuda.get_device_name()
    assert report.device_type == "cuda"
    row = report.rows[0]
    assert row.dense.peak_bytes is not None
    assert row.dense.peak_bytes > report.dense.weight_bytes


def test_multiply_adds_of_block_sparse_linears_are_those_of_their_blocks():
    model = tiny_model("bert")
    gates = ones(analyze(model))
    gates["ffn_row"][0, 3:9] = 0
    compact = apply_selection(model, Selection.from_gates(analyze(model), gates, empty="bias"))
    structure = analyze_blocks(compact, (8, 8))
    masks = {path: torch.eye(*grid) for path, grid in structure.gate_shapes.items()}
    sparse = apply_blocks(compact, BlockSelection(masks, (8, 8)))
    gone = sum(matrix.numel - 64 * int(masks[matrix.path].sum()) for matrix in structure.matrices)
    assert count_macs(compact, 8) - count_macs(sparse, 8) == 8 * gone
