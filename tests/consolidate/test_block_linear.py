"""Block-sparse linears of the compact model: equal to the dense masked weight, in whatever way they run."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from dsprune.consolidate import load_compact, modeling_dsprune
from dsprune.consolidate.compact import without_weights
from dsprune.consolidate.modeling_dsprune import BlockLinear, has_kernel, place, shape_class, use_calibration
from dsprune.measure.bench import bench_models
from dsprune.structure.blocks.grid import block_grid, from_blocks, to_blocks
from tests.helpers.blocks import block_model
from tests.helpers.models import tiny_batch
from tests.helpers.stranger import run_stranger
from tests.helpers.world import run_world

CPU = torch.device("cpu")
# Shape, block and density.
CASES: dict[str, tuple[tuple[int, int], tuple[int, int], float]] = {
    "even": ((64, 96), (32, 32), 0.4),
    "odd multiples of 16": ((48, 80), (16, 16), 0.4),
    "odd multiple of 16, one row": ((16, 48), (16, 16), 0.7),
    "rows left over": ((70, 64), (32, 32), 0.4),
    "columns left over": ((64, 33), (32, 32), 0.5),
    "both left over": ((65, 47), (32, 32), 0.5),
    "wide blocks": ((64, 96), (16, 32), 0.4),
    "tall blocks": ((96, 64), (32, 16), 0.4),
    "wide blocks, both left over": ((50, 70), (16, 32), 0.5),
    "tall blocks, both left over": ((50, 70), (48, 16), 0.5),
    "sides without a common divisor": ((20, 30), (4, 9), 0.5),
    "blocks of one number": ((6, 5), (1, 1), 0.5),
    "one block": ((5, 7), (5, 7), 1.0),
    "all blocks": ((64, 64), (32, 32), 1.0),
    "no blocks": ((64, 64), (32, 32), 0.0),
    "empty block rows": ((160, 64), (32, 32), 0.3),
}
needs_kernel = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch with MKL")


def _linear(
    shape: tuple[int, int],
    block: tuple[int, int],
    density: float,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> tuple[BlockLinear, torch.Tensor]:
    """A module in eval mode with random values, and its weight as a dense one."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(block_grid(shape, block), generator=generator) < density
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    values, row_pointers, columns = to_blocks(weight, mask, block)
    module = BlockLinear(shape, block, len(values), bias=bias, dtype=dtype).eval()
    state = {"row_pointers": row_pointers, "columns": columns}
    if len(values):
        state["values"] = values
    if bias:
        state["bias"] = torch.randn(shape[0], generator=generator, dtype=dtype)
    module.load_state_dict(state)
    return module, from_blocks(values, row_pointers, columns, shape)


def _entry(module: BlockLinear, threshold: float, device: torch.device = CPU) -> dict[str, Any]:
    name, threads, dtype = place(device, next(module.parameters(), torch.zeros(())).dtype)
    own = shape_class(module.out_features, module.in_features)
    return {
        "device": name,
        "threads": threads,
        "dtype": dtype,
        "block": list(module.block),
        "thresholds": {own: threshold},
    }


def _run_sparse(module: BlockLinear) -> BlockLinear:
    use_calibration(module, [_entry(module, 2.0, module.row_pointers.device)])
    return module


def _layout(module: BlockLinear) -> torch.layout | None:
    return None if module._prepared is None else module._prepared.weight.layout


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CASES)
def test_dense_equals_the_masked_weight(case, bias):
    module, weight = _linear(*CASES[case], dtype=torch.float64, bias=bias)
    assert module.density == pytest.approx(module.kept / max(1, len(module.row_pointers) - 1) / module.grid[1])
    x = torch.randn(2, 3, weight.shape[1], dtype=torch.float64)
    expected = functional.linear(x, weight, module.bias)
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    if module.values is not None:
        assert torch.equal(module.to_dense(), weight)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CASES)
def test_bsr_equals_the_masked_weight(case, bias, dtype):
    module, weight = _linear(*CASES[case], dtype=dtype, bias=bias)
    _run_sparse(module)
    with torch.no_grad():
        for leading in [(3,), (2, 5), (), (0,), (2, 0), (2, 200)]:
            x = torch.randn(*leading, weight.shape[1], dtype=dtype)
            torch.testing.assert_close(module(x), functional.linear(x, weight, module.bias), rtol=1e-5, atol=1e-5)
            assert module(x).is_contiguous()
    assert _layout(module) == (torch.sparse_bsr if module.kept else None)


@needs_kernel
def test_inputs_of_any_stride():
    module, weight = _linear((70, 64), (32, 32), 0.5)
    _run_sparse(module)
    wide = torch.randn(64, 300, 4)
    with torch.no_grad():
        for x in [wide.permute(1, 2, 0), wide[:, :, 0].t(), wide[:, 0].t()[None].expand(3, 4, 64)]:
            torch.testing.assert_close(module(x), functional.linear(x, weight, module.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_masked_weight(case):
    shape, block, density = CASES[case]
    module, weight = _linear(shape, block, density, dtype=torch.float64)
    module.train()
    x = torch.randn(4, shape[1], dtype=torch.float64, requires_grad=True)
    theirs = [x.detach().clone().requires_grad_(), weight.clone().requires_grad_(), module.bias.detach().clone()]
    theirs[2].requires_grad_()
    module(x).square().sum().backward()
    functional.linear(*theirs).square().sum().backward()
    torch.testing.assert_close(module.bias.grad, theirs[2].grad)
    if module.values is None:
        assert x.grad is None
        return
    torch.testing.assert_close(x.grad, theirs[0].grad)
    mask = torch.zeros(module.grid, dtype=torch.bool)
    row = torch.arange(module.grid[0]).repeat_interleave(module.row_pointers.diff())
    mask[row, module.columns.long()] = True
    expected, _, _ = to_blocks(theirs[1].grad, mask, block)
    torch.testing.assert_close(module.values.grad, expected)


def test_padding_stays_zero_while_training():
    module, _ = _linear((33, 47), (16, 32), 1.0)
    outside = to_blocks(torch.ones(33, 47), torch.ones(module.grid), module.block)[0] == 0
    optimizer = torch.optim.AdamW(module.train().parameters(), lr=0.1, weight_decay=0.1)
    before = module.values.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(8, 47)).square().mean().backward()
        assert not module.values.grad[outside].any()
        optimizer.step()
    assert not module.values[outside].any()
    assert (module.values != before)[~outside].all()


@pytest.mark.parametrize("threshold", [0.0, 2.0], ids=["dense", "BSR"])
def test_what_lies_in_the_padding_has_no_influence(threshold):
    module, weight = _linear((33, 47), (16, 32), 1.0)
    use_calibration(module, [_entry(module, threshold)])
    outside = to_blocks(torch.ones(33, 47), torch.ones(module.grid), module.block)[0] == 0
    with torch.no_grad():
        module.values[outside] = 5.0
        x = torch.randn(3, 47)
        torch.testing.assert_close(module(x), functional.linear(x, weight, module.bias), rtol=1e-5, atol=1e-5)


def test_too_many_blocks_are_told():
    with pytest.raises(ValueError, match=r"7 blocks of \(16, 16\) do not fit into 2 x 3 of them"):
        BlockLinear((32, 48), (16, 16), 7)


def test_a_new_module_is_valid_whatever_its_size():
    for kept in range(7):
        module = BlockLinear((40, 33), (16, 16), kept).eval()
        _run_sparse(module)
        with torch.no_grad():
            assert not module(torch.ones(2, 33)).any()


# --- which of the two runs ----------------------------------------------------------------------


@needs_kernel
def test_the_measured_density_decides():
    module, _ = _linear((64, 64), (16, 16), 0.5)
    x = torch.randn(2, 64)
    with torch.no_grad():
        for table, layout in [
            ([], torch.strided),
            ([_entry(module, module.density - 1e-6)], torch.strided),
            ([_entry(module, module.density)], torch.sparse_bsr),
            ([_entry(module, 2.0) | {"device": "another"}], torch.strided),
            ([_entry(module, 2.0) | {"threads": 77}], torch.strided),
            ([_entry(module, 2.0) | {"dtype": "float64"}], torch.strided),
            ([_entry(module, 2.0) | {"block": [32, 32]}], torch.strided),
            ([_entry(module, 2.0) | {"thresholds": {"512x512": 2.0}}], torch.strided),
            ([_entry(module, 2.0) | {"dtype": "float64"}, _entry(module, 2.0)], torch.sparse_bsr),
        ]:
            use_calibration(module, table)
            module(x)
            assert _layout(module) is layout, table


def test_shapes_are_classed_by_powers_of_two():
    assert shape_class(384, 384) == "512x512"
    assert shape_class(1536, 360) == "2048x256"
    assert shape_class(16, 1) == "16x1"


@pytest.fixture
def nothing_known():
    """Kernels are tried anew, warnings given anew."""
    caches = [has_kernel, modeling_dsprune.missing_kernel, modeling_dsprune._warn_once]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def _outputs_and_warnings(modules, dtype=torch.float32):
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        outputs = [module(torch.ones(2, module.in_features, dtype=dtype)) for module in modules]
    return outputs, [str(warning.message) for warning in caught]


def _assert_dense(module, weight, output, tolerance):
    assert _layout(module) is torch.strided
    expected = functional.linear(torch.ones(2, weight.shape[1]), weight.float(), module.bias.float())
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "not measured"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_dtype_without_a_kernel_runs_dense_and_says_so_once(dtype, measured):
    pairs = [_linear((64, 64), (16, 16), 0.5, dtype=dtype), _linear((96, 33), (16, 16), 0.5, dtype=dtype)]
    if measured:
        for module, _ in pairs:
            _run_sparse(module)
    outputs, told = _outputs_and_warnings([module for module, _ in pairs], dtype)
    assert len(told) == 1
    assert "block-sparse weights run dense" in told[0]
    for (module, weight), output in zip(pairs, outputs, strict=True):
        _assert_dense(module, weight, output, 0.02)


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("what", ["no MKL", "raises", "wrong"])
def test_a_device_without_a_working_kernel_runs_dense_and_says_so_once(what, monkeypatch):
    pairs = [_linear((64, 64), (16, 16), 0.5), _linear((96, 33), (16, 16), 0.5)]
    for module, _ in pairs:
        _run_sparse(module)
    if what == "no MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    elif what == "raises":

        def fail(*_):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(torch, "addmm", fail)
    else:
        monkeypatch.setattr(torch, "addmm", lambda bias, weight, x: weight.to_dense() @ x + 1)
    outputs, told = _outputs_and_warnings([module for module, _ in pairs])
    reasons = {"no MKL": "without MKL", "raises": "fails with RuntimeError: no such kernel", "wrong": "is wrong"}
    assert len(told) == 1
    assert reasons[what] in told[0]
    for (module, weight), output in zip(pairs, outputs, strict=True):
        _assert_dense(module, weight, output, 1e-5)


@needs_kernel
@pytest.mark.usefixtures("nothing_known")
def test_a_device_with_a_kernel_but_no_measurement_runs_dense_in_silence():
    module, _ = _linear((64, 64), (16, 16), 0.5)
    _, told = _outputs_and_warnings([module])
    assert not told
    assert _layout(module) is torch.strided


def test_kernels_that_are_known_to_be_missing():
    missing = modeling_dsprune.missing_kernel
    gpu = torch.device("cuda")
    assert "on mps" in missing(torch.device("mps"), torch.float32, (16, 16))
    assert "24 x 24" in missing(gpu, torch.float32, (24, 24))
    assert "4 x 9" in missing(gpu, torch.float32, (4, 9))
    assert missing(gpu, torch.float32, (48, 16)) is None
    assert modeling_dsprune.kernel_side((48, 96), gpu) == 16
    assert modeling_dsprune.kernel_side((48, 96), CPU) == 48


@needs_kernel
def test_damaged_indices_are_told_before_a_kernel_reads_anywhere():
    module, _ = _linear((64, 64), (16, 16), 0.5)
    _run_sparse(module)
    module.columns[0] = 1000
    with torch.no_grad(), pytest.raises(RuntimeError):
        module(torch.ones(2, 64))


# --- what inference keeps -----------------------------------------------------------------------

WAYS = pytest.mark.parametrize("threshold", [0.0, pytest.param(2.0, marks=needs_kernel)], ids=["dense", "BSR"])


def _check(module, x=None):
    """The output of a module against a weight made anew."""
    with torch.no_grad():
        x = torch.randn(3, module.in_features, dtype=module.values.dtype) if x is None else x
        expected = functional.linear(x, module.to_dense(), module.bias)
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def _kept(threshold):
    module, _ = _linear((70, 64), (32, 16), 0.5)
    use_calibration(module, [_entry(module, threshold)])
    _check(module)
    assert module._prepared is not None
    return module


@WAYS
def test_the_weight_is_made_once(threshold):
    module = _kept(threshold)
    weight = module._prepared.weight
    _check(module)
    assert module._prepared.weight is weight


@WAYS
def test_values_that_change_are_seen(threshold):
    module = _kept(threshold)
    with torch.no_grad():
        module.values.mul_(2)
    _check(module)
    module.load_state_dict({name: tensor + 0 for name, tensor in module.state_dict().items()})
    _check(module)
    module.values = torch.nn.Parameter(torch.randn_like(module.values))
    _check(module)
    module.values.data = torch.randn_like(module.values)
    _check(module)
    elsewhere = BlockLinear((70, 64), (32, 16), module.kept)
    assert not torch.equal(elsewhere.columns, module.columns)
    module.row_pointers.copy_(elsewhere.row_pointers)
    module.columns.copy_(elsewhere.columns)
    _check(module)


@WAYS
def test_nothing_is_kept_in_training(threshold):
    """DeepSpeed writes where no version counter sees it: what inference kept must be gone by then."""
    module = _kept(threshold)
    module(torch.randn(2, 64))
    assert module._prepared is None
    module.values.data.mul_(2)
    _check(module)
    module.train()
    with torch.no_grad():
        module(torch.randn(2, 64))
    assert module._prepared is None


@WAYS
def test_partitioned_values_are_never_kept(threshold):
    module = _kept(threshold)
    module.values.ds_id = 0
    _check(module)
    assert module._prepared is None


@WAYS
def test_what_was_kept_goes_with_its_values(threshold):
    module = _kept(threshold)
    weight = weakref.ref(module._prepared.weight)
    gc.disable()
    try:
        module.values = torch.nn.Parameter(torch.empty_like(module.values, device="meta"))
        assert weight() is None
    finally:
        gc.enable()


@WAYS
def test_what_inference_mode_made_serves_outside_it(threshold):
    module, _ = _linear((70, 64), (32, 16), 0.5)
    use_calibration(module, [_entry(module, threshold)])
    with torch.inference_mode():
        module(torch.ones(2, 64))
    weight = module._prepared.weight
    assert not weight.is_inference()
    _check(module)
    assert module._prepared.weight is weight


@WAYS
def test_another_dtype_is_another_weight(threshold):
    module = _kept(threshold)
    module.double()
    assert module._prepared is None
    assert module.columns.dtype == module.row_pointers.dtype == torch.int32
    _check(module)
    assert module._prepared.weight.dtype is torch.float64


@WAYS
def test_a_copy_is_independent(threshold):
    module = _kept(threshold)
    twin = copy.deepcopy(module)
    assert twin._prepared is None
    assert twin.thresholds == module.thresholds
    with torch.no_grad():
        twin.values.mul_(3)
    _check(twin)
    _check(module)
    assert torch.equal(twin.values, 3 * module.values)


@WAYS
def test_autocast_and_the_compiler_get_the_dense_weight(threshold):
    module = _kept(threshold)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, 64)).dtype is torch.bfloat16
    x = torch.randn(2, 64)
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x), rtol=1e-5, atol=1e-5)


# --- in a model ---------------------------------------------------------------------------------


def _logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**tiny_batch())[0]


def _densified(model: Any) -> Any:
    """The same model with plain linears in place of the block-sparse ones."""
    plain = copy.deepcopy(model)
    for path, module in model.named_modules():
        if isinstance(module, BlockLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features)
            linear.bias.data = module.bias.data.clone()
            linear.weight.data = (
                torch.zeros_like(linear.weight) if module.values is None else module.to_dense().detach()
            )
            parent, _, name = path.rpartition(".")
            setattr(plain.get_submodule(parent), name, linear)
    return plain


def _table(model: Any) -> list[dict[str, Any]]:
    modules = [module for module in model.modules() if isinstance(module, BlockLinear)]
    return [_entry(module, 2.0) for module in modules]


def test_a_model_equals_the_one_with_dense_weights():
    model = block_model()
    assert [type(module) for _, module in model.bert.encoder.layer[0].named_modules()].count(BlockLinear) == 6
    torch.testing.assert_close(_logits(model), _logits(_densified(model)), rtol=0, atol=1e-6)


@WAYS
def test_a_model_can_be_timed(threshold, tmp_path):
    """With everything that bench does to it: counted under a dispatch mode, run in inference mode."""
    model = block_model()
    block_model(
        [entry | {"thresholds": dict.fromkeys(entry["thresholds"], threshold)} for entry in _table(model)], tmp_path
    )
    report = bench_models(tmp_path, tmp_path, batch_sizes=[2], length=8, device="cpu", runs=1, warmup=0, threads=1)
    assert report.dense.parameters == sum(param.numel() for param in model.parameters())
    assert report.dense.macs > 0


@needs_kernel
def test_a_calibrated_folder_runs_bsr(tmp_path):
    model = block_model(_table(block_model()), tmp_path / "model")
    loaded = load_compact(tmp_path / "model")
    torch.testing.assert_close(_logits(loaded), _logits(_densified(model)), rtol=0, atol=1e-5)
    query = loaded.bert.encoder.layer[0].attention.self.query
    assert query.thresholds
    assert _layout(query) is torch.sparse_bsr
    loaded.save_pretrained(tmp_path / "again")
    again = load_compact(tmp_path / "again")
    assert torch.equal(_logits(again), _logits(loaded))
    assert _layout(again.bert.encoder.layer[0].attention.self.query) is torch.sparse_bsr


@pytest.mark.filterwarnings("ignore:block-sparse weights run dense")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_and_loaded(dtype, tmp_path):
    model = block_model(folder=tmp_path / "model").to(dtype)
    loaded = load_compact(tmp_path / "model", dtype=dtype)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype is theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(_logits(loaded), _logits(model))


def test_built_without_weights_it_has_the_shapes_that_the_file_has(tmp_path):
    model = block_model(folder=tmp_path)
    built = without_weights(json.loads((tmp_path / "config.json").read_text()))
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def test_a_model_learns_and_is_saved_anew(tmp_path):
    model = block_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = _logits(model)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
        for name, param in model.named_parameters():
            assert param.grad is not None, name
        optimizer.step()
    assert not torch.equal(before, _logits(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(load_compact(tmp_path)), _logits(model))


def test_only_plain_linears_can_be_block_sparse():
    layer = block_model().bert.encoder.layer[1]
    with pytest.raises(ValueError, match="LayerNorm is a LayerNorm: only a plain linear can be block-sparse"):
        modeling_dsprune._make_block_sparse(layer, "output.LayerNorm", [16, 16], 1)


STRANGER = """
import sys
import torch
from transformers import AutoModelForSequenceClassification
folder, logits, batch = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(model(**torch.load(batch))[0], torch.load(logits), rtol=0, atol=1e-5)
query = model.bert.encoder.layer[0].attention.self.query
print(type(query).__name__, query._prepared.weight.layout)
"""


@needs_kernel
def test_a_stranger_without_dsprune_runs_bsr_too(tmp_path):
    folder = tmp_path / "model"
    model = block_model(_table(block_model()), folder)
    torch.save(_logits(model), tmp_path / "logits.pt")
    torch.save(tiny_batch(), tmp_path / "batch.pt")
    arguments = [folder, tmp_path / "logits.pt", tmp_path / "batch.pt"]
    assert run_stranger(STRANGER, tmp_path, *arguments).strip() == "BlockLinear torch.sparse_bsr"


# --- under DeepSpeed ----------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 0])


def _learn(model: Any, step: Any) -> list[Any]:
    """Logits before, between and after two steps, in eval mode and without gradients."""
    logits = [_logits(model).tolist()]
    for _ in range(2):
        model.train()
        step(model(**tiny_batch(), labels=LABELS).loss)
        logits.append(_logits(model).tolist())
    return logits


def _learn_under_zero(folder: Path) -> dict[int, list[Any]]:
    """Runs on every rank: a calibrated folder, loaded, evaluated and trained at each ZeRO stage."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    logits = {}
    for stage in (0, 1, 2, 3):
        config = {
            "train_micro_batch_size_per_gpu": 3,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        }
        keep = HfDeepSpeedConfig(config) if stage == 3 else None
        model = load_compact(folder)
        del keep
        unset_hf_deepspeed_config()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

        def step(loss, engine=engine):
            engine.backward(loss)
            engine.step()

        logits[stage] = _learn(engine, step)
    return logits


@pytest.mark.dist
@needs_kernel
def test_every_zero_stage_evaluates_what_it_trained(tmp_path):
    model = block_model(_table(block_model()), tmp_path)
    # Dropout would be drawn differently on every rank.
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(tmp_path)
    model = load_compact(tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    expected = torch.tensor(_learn(model, step))
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for of_rank in run_world(_learn_under_zero, 2, tmp_path):
        for stage, logits in of_rank.items():
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4, msg=f"ZeRO-{stage}")


# --- on a GPU -----------------------------------------------------------------------------------

GPU_CASES = [name for name, (_, block, _) in CASES.items() if min(block) >= 16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_bsr_on_a_gpu(case, dtype):
    module, weight = _linear(*CASES[case], dtype=dtype)
    module, weight = module.cuda(), weight.cuda()
    _run_sparse(module)
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    with torch.no_grad():
        for leading in [(3,), (2, 5), (0,), (2, 200)]:
            x = torch.randn(*leading, weight.shape[1], dtype=dtype, device="cuda")
            torch.testing.assert_close(
                module(x), functional.linear(x, weight, module.bias), rtol=tolerance, atol=tolerance
            )
    assert _layout(module) == (torch.sparse_bsr if module.kept else None)


@pytest.mark.gpu
def test_a_model_moves_to_a_gpu_and_back():
    model = block_model()
    expected = _logits(model)
    model.cuda()
    with torch.no_grad():
        moved = model(**{name: tensor.cuda() for name, tensor in tiny_batch().items()})[0]
    torch.testing.assert_close(moved.cpu(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(_logits(model.cpu()), expected, rtol=0, atol=1e-6)
