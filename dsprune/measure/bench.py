"""Two models side by side: latency, throughput, memory, and the multiply-adds that explain them.

Both run in one process, in turn, on the same input, so that a clock that changes speed or a busy
neighbour hits both. Every figure names what it was taken on.
"""

from __future__ import annotations

import ctypes
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dsprune.consolidate.modeling_dsprune import device_name
from dsprune.dtypes import DTYPES, torch_dtype
from dsprune.errors import ConfigError
from dsprune.files import first_line
from dsprune.measure.bench_report import BenchReport, BenchRow, Measurement, ModelFacts
from dsprune.pretrained import read_model_config

__all__ = [
    "BenchReport",
    "bench_models",
    "check_options",
    "count_macs",
    "limit_threads",
    "num_positions",
    "random_inputs",
    "wait",
]

AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",  # GPT-2's name for it
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "EncoderModel": "AutoModelForTextEncoding",
    "Model": "AutoModel",
}
MEMORY_NOTES = {
    "cuda": "peak: weights + the most that one forward holds above them in PyTorch's allocator (no context, no inputs)",
    "cpu": "peak: weights + the growth of resident memory (VmHWM) during one forward, good to a tenth or two",
}

Source = str | Path | tuple[str, nn.Module]


def bench_models(
    dense: Source,
    compact: Source,
    *,
    batch_sizes: Sequence[int],
    length: int,
    dtype: str = "float32",
    device: str | None = None,
    runs: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> BenchReport:
    """Time two models in turn on the same random token ids.

    A local folder whose config.json has an `auto_map` brings its own modelling file, and that code
    is run; code from the hub never is.

    Args:
        dense: model folder, hub id, or a model in memory and its name.
        compact: likewise.
        batch_sizes: sequences a forward; each size is a row of the report.
        length: tokens a sequence; nothing is padding.
        dtype: float32, bfloat16 or float16.
        device: `cpu` or `cuda[:N]`; by default a GPU if there is one.
        runs: timed forwards of each model at each batch size.
        warmup: forwards before those.
        threads: CPU threads of torch while this runs; by default as many as it has now.
        seed: of the token ids.
        progress: show a bar on stderr.

    Raises:
        ConfigError: a folder that is no model, a length that a model has no positions for, models of
            different vocabularies, a device that is not there, an unknown or unfit dtype, a batch
            that does not fit into GPU memory.
    """
    place = check_options(batch_sizes, length, dtype, device, runs, warmup, threads)
    sources = [source[0] if isinstance(source, tuple) else str(source) for source in (dense, compact)]
    models = [_load(source, torch_dtype(dtype)) for source in (dense, compact)]
    _check_fit(sources, models, length)
    models = [model.to(place) for model in models]
    with limit_threads(threads), torch.inference_mode():
        facts = [_facts(source, model, length) for source, model in zip(sources, models, strict=True)]
        rows = []
        with tqdm(total=len(batch_sizes) * (warmup + runs), desc="bench", disable=not progress) as bar:
            for size in batch_sizes:
                inputs = random_inputs(models[0], size, length, seed, place)
                timings = _measure(models, inputs, runs, warmup, bar)
                rows.append(BenchRow(size, *timings, facts[0].macs / facts[1].macs))
        return BenchReport(
            dense=facts[0],
            compact=facts[1],
            rows=tuple(rows),
            device=describe_device(place),
            device_type=place.type,
            threads=torch.get_num_threads(),
            dtype=dtype,
            matmul_precision=torch.get_float32_matmul_precision(),
            length=length,
            runs=runs,
            warmup=warmup,
            seed=seed,
            memory=MEMORY_NOTES[place.type],
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )


def count_macs(model: nn.Module, length: int) -> int:
    """Multiply-adds of one sequence of `length` tokens: linears and attention, counted on a real forward.

    Attention is computed as plain matrix products meanwhile, because the counter does not know the
    fused kernel of the CPU. Of block-sparse linears only the stored blocks count. The count does not
    depend on the batch size.
    """
    absent: list[int] = []

    def note(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        absent.append(_absent(module) * (args[0].numel() // args[0].shape[-1]))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if _is_block_sparse(module)]
    # With gradients, block-sparse linears run dense, which the counter knows.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = random_inputs(model, 1, length, 0, next(model.parameters()).device)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs)
    for hook in hooks:
        hook.remove()
    return int(counter.get_total_flops()) // 2 - sum(absent)


def _is_block_sparse(module: nn.Module) -> bool:
    return type(module).__name__ == "BlockLinear"  # a folder's own copy of the class is another class


def _absent(module: nn.Module) -> int:
    """Weights of a block-sparse linear that the dense product multiplies by and that are not there."""
    facts: Any = module
    stored: int = facts.kept * facts.block[0] * facts.block[1]
    return max(0, int(facts.out_features * facts.in_features) - stored)


def check_options(
    batch_sizes: Sequence[int],
    length: int,
    dtype: str,
    device: str | None,
    runs: int,
    warmup: int,
    threads: int | None,
) -> torch.device:
    """The device, once everything that needs no model is known to be right.

    Raises:
        ConfigError: what is not, all of it.
    """
    mistakes = []
    if not batch_sizes:
        mistakes.append("no batch sizes given: give at least one")
    least = [("runs", runs, 1), ("warmup", warmup, 0), ("length", length, 1)]
    least += [("batch size", size, 1) for size in batch_sizes]
    least += [("threads", threads, 1)] if threads is not None else []
    mistakes += [f"{name} is {given}: it must be at least {floor}" for name, given, floor in least if given < floor]
    if dtype not in DTYPES:
        mistakes.append(f"unknown dtype '{dtype}': there are {', '.join(DTYPES)}")
    place, mistake = _find_device(device)
    if mistake:
        mistakes.append(mistake)
    elif dtype == "float16" and place.type == "cpu":
        mistakes.append("float16 on a CPU says nothing about speed: use dtype float32 or bfloat16, or a GPU")
    if mistakes:
        raise ConfigError(*mistakes)
    return place


def _find_device(name: str | None) -> tuple[torch.device, str | None]:
    """The device of a name, and what is wrong with it."""
    cpu, there = torch.device("cpu"), torch.cuda.device_count()
    match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", name or ("cuda" if there else "cpu"))
    if match is None:
        return cpu, f"unknown device '{name}': give cpu, cuda or cuda:N"
    if match[1]:
        return cpu, None
    if int(match[2] or 0) >= there:
        return cpu, f"device '{name}' is not there: torch {torch.__version__} sees {there} GPU(s) on this machine"
    return torch.device("cuda", int(match[2]) if match[2] else torch.cuda.current_device()), None


def _load(source: Source, dtype: torch.dtype) -> nn.Module:
    """A model in eval mode on the CPU, as the class that its configuration names first."""
    if isinstance(source, tuple):
        return source[1].to(dtype).eval()
    folder = Path(source)
    local = folder.is_dir()
    if not local and (isinstance(source, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        raise ConfigError(f"there is no model folder {source}")
    if local and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json")
    try:
        own_code = local and "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = read_model_config(str(source), own_code=own_code)
        auto_class = _auto_class(str(source), config)
        model: nn.Module = auto_class.from_pretrained(str(source), dtype=dtype, trust_remote_code=own_code)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        where = "" if local else ", no folder here and not to be had from the hub"
        raise ConfigError(f"cannot load model '{source}'{where}: {first_line(error)}") from error
    return model.eval()


def _auto_class(source: str, config: Any) -> Any:
    architecture = (config.architectures or ["none"])[0]
    for head, name in AUTO_CLASSES.items():
        if architecture.endswith(head):
            return getattr(transformers, name)
    raise ConfigError(
        f"'{source}' has the architecture '{architecture}': bench times {', '.join(AUTO_CLASSES)}; "
        "give the fine-tuned model"
    )


def _check_fit(sources: Sequence[str], models: Sequence[nn.Module], length: int) -> None:
    mistakes = []
    vocabularies = [model.get_input_embeddings().num_embeddings for model in models]  # type: ignore[operator]
    if vocabularies[0] != vocabularies[1]:
        known = " and ".join(f"'{s}' has {v:,} tokens" for s, v in zip(sources, vocabularies, strict=True))
        mistakes.append(f"{known}: the two must read the same input, give models of one vocabulary")
    for source, model in zip(sources, models, strict=True):
        positions = num_positions(model)
        if positions is not None and length > positions:
            mistakes.append(f"length {length} is more than the {positions} positions of '{source}': give a smaller one")
    if mistakes:
        raise ConfigError(*dict.fromkeys(mistakes))


def num_positions(model: nn.Module) -> int | None:
    """The longest input; RoBERTa keeps its first positions, up to the padding index, for itself."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1  # type: ignore[arg-type]
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else int(positions)


def random_inputs(model: nn.Module, size: int, length: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Random ids [size, length] without the padding id, for a decoder beside an encoder as well, and a mask of ones."""
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(seed))
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        ids[ids == padding] = (padding + 1) % vocabulary
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    return inputs | ({"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {})  # type: ignore[union-attr]


def _facts(source: str, model: nn.Module, length: int) -> ModelFacts:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = [lists[name] for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return ModelFacts(
        source=source,
        architecture=type(model).__name__,
        attention=str(getattr(model.config, "_attn_implementation", None) or "unknown"),
        parameters=_count(model),
        encoder_parameters=sum(map(_count, stacks)) if stacks else None,
        weight_bytes=_weight_bytes(model),
        macs=count_macs(model, length),
    )


def _count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _measure(
    models: Sequence[nn.Module], inputs: dict[str, Tensor], runs: int, warmup: int, bar: tqdm[Any]
) -> tuple[Measurement, Measurement]:
    """Time the models in turn at one batch size; memory afterwards, because taking it disturbs the clock."""
    samples: list[list[float]] = [[] for _ in models]
    size, length = inputs["input_ids"].shape
    try:
        for run in range(warmup + runs):
            seconds = [_time(model, inputs) for model in models]
            if run >= warmup:
                for own, value in zip(samples, seconds, strict=True):
                    own.append(value)
            bar.update()
        peaks = [_peak_bytes(model, inputs) for model in models]
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"batch {size} x {length} tokens does not fit into GPU memory: give a smaller one") from error
    dense, compact = (_summary(own, peak, size, length) for own, peak in zip(samples, peaks, strict=True))
    return dense, compact


def _time(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Seconds of one forward, until its last kernel is done."""
    device = inputs["input_ids"].device
    wait(device)
    start = time.perf_counter()
    model(**inputs)
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(seconds: Sequence[float], peak: int | None, size: int, length: int) -> Measurement:
    p10, median, p90 = (float(value) for value in np.percentile(seconds, [10, 50, 90]))
    rate = size / median
    return Measurement(1e3 * median, 1e3 * p10, 1e3 * p90, rate, rate * length, peak)


def _peak_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int | None:
    device = inputs["input_ids"].device
    growth = _gpu_growth(model, inputs, device) if device.type == "cuda" else _resident_growth(model, inputs)
    return None if growth is None else _weight_bytes(model) + growth


def _gpu_growth(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(**inputs)
    return torch.cuda.max_memory_allocated(device) - before


def _resident_growth(model: nn.Module, inputs: dict[str, Tensor]) -> int | None:
    """Highest resident memory during a forward above that before it; None off Linux or without glibc.

    Without `malloc_trim` the heap keeps the pages of earlier forwards and the growth is anything
    down to zero.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # makes VmHWM the present resident size: proc(5)
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    model(**inputs)
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {name}"
    return 1024 * int(match[1])


def describe_device(device: torch.device) -> str:
    """Name of a GPU, or of the CPU with its number of threads."""
    name = device_name(device)
    return name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} thread(s)"


@contextmanager
def limit_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
