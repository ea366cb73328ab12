"""Latency and throughput of two models, side by side: one process, the same input, alternating runs.

A figure of either model alone says little on a shared machine. Alternating makes both see the same
disturbances; medians and the spread between the 10th and 90th percentile are reported.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dsprune.errors import ConfigError
from dsprune.measure.tables import render_table

__all__ = ["BenchReport", "BenchRow", "bench_models"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class BenchRow:
    """One batch size. Times are milliseconds a forward pass; a spread is (10th, 90th percentile).

    Attributes:
        mac_ratio: multiply-adds of the dense model over those of the compact one.
        dense_peak_mb: on CUDA the peak of allocated memory in this model's passes; None on CPU.
        compact_peak_mb: likewise.
    """

    batch_size: int
    dense_ms: float
    compact_ms: float
    dense_spread: tuple[float, float]
    compact_spread: tuple[float, float]
    mac_ratio: float
    dense_peak_mb: float | None
    compact_peak_mb: float | None

    @property
    def speedup(self) -> float:
        """Ratio of the median latencies; below 1 the compact model is slower."""
        return self.dense_ms / self.compact_ms


@dataclass(frozen=True)
class BenchReport:
    """Everything that a figure needs to be compared with another."""

    dense: str
    compact: str
    device: str
    dtype: str
    length: int
    runs: int
    threads: int
    versions: dict[str, str]
    dense_parameters: int
    compact_parameters: int
    rows: tuple[BenchRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, speedups included."""
        data = asdict(self)
        for row, plain in zip(self.rows, data["rows"], strict=True):
            plain["speedup"] = row.speedup
            plain["share_of_mac_ratio"] = row.speedup / row.mac_ratio
        return data

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def render(self) -> str:
        """A table for people."""
        headers = ["batch", "dense ms", "(p10-p90)", "compact ms", "(p10-p90)", "speedup", "MAC ratio", "achieved"]
        headers += ["dense tok/s", "compact tok/s", "peak MB"]
        lines = [
            render_table(headers, [self._row(row) for row in self.rows]),
            f"median of {self.runs} alternating runs; length {self.length}, {self.dtype}, {self.device}",
            f"parameters: dense {self.dense_parameters:,}, compact {self.compact_parameters:,} (total)",
        ]
        slower = [row.batch_size for row in self.rows if row.speedup < 1]
        if slower:
            lines.append(f"the compact model is SLOWER at batch {', '.join(map(str, slower))}")
        return "\n".join(lines)

    def _row(self, row: BenchRow) -> list[str]:
        tokens = row.batch_size * self.length * 1000
        peak = "-" if row.dense_peak_mb is None else f"{row.dense_peak_mb:.0f} / {row.compact_peak_mb:.0f}"
        return [
            str(row.batch_size),
            f"{row.dense_ms:.2f}",
            "{:.1f}-{:.1f}".format(*row.dense_spread),
            f"{row.compact_ms:.2f}",
            "{:.1f}-{:.1f}".format(*row.compact_spread),
            f"{row.speedup:.2f}x",
            f"{row.mac_ratio:.2f}x",
            f"{row.speedup / row.mac_ratio:.0%}",
            f"{tokens / row.dense_ms:,.0f}",
            f"{tokens / row.compact_ms:,.0f}",
            peak,
        ]


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for and this machine has no usable GPU")
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"CPU ({name}), {torch.get_num_threads()} thread(s)"


def _load(source: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    remote = (Path(source) / "config.json").is_file()
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=remote)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load model '{source}': {str(error).splitlines()[0]}") from error
    name = (config.architectures or [""])[0]
    auto = next((cls for suffix, cls in AUTO_CLASSES.items() if name.endswith(suffix)), "AutoModel")
    model = getattr(transformers, auto).from_pretrained(source, dtype=dtype, trust_remote_code=remote)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _check(dense: nn.Module, compact: nn.Module, length: int) -> None:
    sizes = [model.config.vocab_size for model in (dense, compact)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the models have vocabularies of {sizes[0]} and {sizes[1]}: they cannot share an input")
    for model in (dense, compact):
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise ConfigError(f"length {length}: a model has {positions} positions")


def _batch(vocab: int, size: int, length: int, device: torch.device, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab, (size, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def _time(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> float:
    """Milliseconds of one forward pass."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    model(**batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)


@torch.inference_mode()
def _macs(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Multiply-adds of one example, counted on a real forward pass."""
    one = {name: tensor[:1] for name, tensor in batch.items()}
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(**one)
    return int(counter.get_total_flops()) // 2


def _peak_mb(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    _time(model, batch, device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def _spread(times: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _measure(
    models: Sequence[nn.Module], batch: dict[str, Tensor], device: torch.device, *, runs: int, warmup: int
) -> BenchRow:
    for _ in range(warmup):
        for model in models:
            _time(model, batch, device)
    times: list[list[float]] = [[], []]
    gc.disable()
    try:
        for _ in range(runs):
            for kept, model in zip(times, models, strict=True):
                kept.append(_time(model, batch, device))
    finally:
        gc.enable()
    macs = [_macs(model, batch) for model in models]
    peaks = [_peak_mb(model, batch, device) for model in models]
    return BenchRow(
        batch_size=len(batch["input_ids"]),
        dense_ms=statistics.median(times[0]),
        compact_ms=statistics.median(times[1]),
        dense_spread=_spread(times[0]),
        compact_spread=_spread(times[1]),
        mac_ratio=macs[0] / max(1, macs[1]),
        dense_peak_mb=peaks[0],
        compact_peak_mb=peaks[1],
    )


def bench_models(
    dense: str | Path,
    compact: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 32, 128),
    length: int = 128,
    dtype: str = "float32",
    device: str | None = None,
    runs: int = 20,
    warmup: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> BenchReport:
    """Time two model folders against each other.

    Args:
        dense: folder (or hub id) of the model to compare with.
        compact: folder of the model to time.
        batch_sizes: sequences in a forward pass, one row of the report each.
        length: tokens in a sequence, none of them padding.
        dtype: float32, bfloat16 or float16.
        device: "cpu" or "cuda"; by default a GPU where there is one.
        runs: timed passes of each model, at least 2.
        warmup: untimed passes first.
        seed: of the random input.
        progress: show a progress bar.

    Raises:
        ConfigError: a folder that is no model, models that cannot share an input, a device or dtype
            that is not to be had.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}': there are {', '.join(DTYPES)}")
    if dtype == "float16" and place.type == "cpu":
        raise ConfigError("float16 on CPU is emulated and says nothing about speed: use float32 or bfloat16")
    if runs < 2 or length < 1 or min(batch_sizes, default=0) < 1:
        raise ConfigError("runs must be at least 2, length and batch sizes at least 1")
    models = [_load(str(source), DTYPES[dtype], place) for source in (dense, compact)]
    _check(models[0], models[1], length)
    sizes = list(batch_sizes)
    if progress:
        from tqdm import tqdm

        sizes = tqdm(sizes, desc="bench", unit="batch size")
    rows = tuple(
        _measure(models, _batch(models[0].config.vocab_size, n, length, place, seed), place, runs=runs, warmup=warmup)
        for n in sizes
    )
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    return BenchReport(
        dense=str(dense),
        compact=str(compact),
        device=_device_name(place),
        dtype=dtype,
        length=length,
        runs=runs,
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        dense_parameters=counts[0],
        compact_parameters=counts[1],
        rows=rows,
    )
