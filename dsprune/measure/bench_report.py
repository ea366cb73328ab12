"""What a comparison of two models found: as data, as JSON, and as text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsprune.errors import OutputError
from dsprune.measure.tables import render_table

__all__ = ["BenchReport", "BenchRow", "Measurement", "ModelFacts", "describe_speedup"]

MEGABYTE = 10**6


@dataclass(frozen=True)
class ModelFacts:
    """What was timed. Parameters and bytes are those of the loaded model, tied weights counted once."""

    source: str
    architecture: str
    attention: str
    """Which implementation of attention `transformers` chose, such as `sdpa`."""
    parameters: int
    encoder_parameters: int | None
    """Parameters of the stack of layers; None where the model has no such list."""
    weight_bytes: int
    """Parameters and buffers, in the dtype of the measurement."""
    macs: int
    """Multiply-adds of one sequence: linears and attention."""


@dataclass(frozen=True)
class Measurement:
    """One model at one batch size. A latency is that of a forward of the whole batch."""

    latency_ms: float
    """Median."""
    p10_ms: float
    p90_ms: float
    sentences_per_s: float
    tokens_per_s: float
    peak_bytes: int | None
    """`BenchReport.memory` says what this counts; None where it cannot be measured."""


@dataclass(frozen=True)
class BenchRow:
    """Both models at one batch size."""

    batch_size: int
    dense: Measurement
    compact: Measurement
    mac_ratio: float
    """Multiply-adds of dense over compact."""

    @property
    def dense_ms(self) -> float:
        return self.dense.latency_ms

    @property
    def compact_ms(self) -> float:
        return self.compact.latency_ms

    @property
    def speedup(self) -> float:
        """Median latency of dense over compact; below 1 the compact model is slower."""
        return self.dense_ms / self.compact_ms

    @property
    def achieved(self) -> float:
        """Speedup over the ratio of multiply-adds: how much of the arithmetic saved is time saved."""
        return self.speedup / self.mac_ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        verdict = describe_speedup(self.speedup)
        return asdict(self) | {"speedup": self.speedup, "verdict": verdict, "achieved": self.achieved}


@dataclass(frozen=True)
class BenchReport:
    """The whole comparison, with everything that its figures depend on."""

    dense: ModelFacts
    compact: ModelFacts
    rows: tuple[BenchRow, ...]
    device: str
    """Name of the GPU, or of the CPU with its number of threads."""
    device_type: str
    threads: int
    dtype: str
    matmul_precision: str
    """`torch.get_float32_matmul_precision()`: whether float32 products may use TF32."""
    length: int
    runs: int
    warmup: int
    seed: int
    memory: str
    """What `peak_bytes` counts."""
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; a row holds its speedup, the same in words, and the share achieved."""
        return asdict(self) | {"rows": [row.to_dict() for row in self.rows]}

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the figures to {path}: {error.strerror}") from error

    def render(self) -> str:
        """Two tables, the models and the timings, and what they were taken on."""
        precision = f" (matmul precision {self.matmul_precision})" if self.dtype == "float32" else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join(
            [
                f"{self.device}, {self.dtype}{precision}, {self.length} tokens a sequence, no padding",
                versions,
                "",
                self._render_models(),
                "",
                self._render_timings(),
                "",
                f"latency: median of {self.runs} forwards, the models in turn, after {self.warmup} to warm up",
                self.memory,
                "achieved: ratio of latencies over ratio of multiply-adds (linears and attention, counted)",
            ]
        )

    def _render_models(self) -> str:
        headers = ["model", "class", "attention", "encoder params", "total params", "weights MB", "MMACs a sequence"]
        rows = []
        for name, facts in (("dense", self.dense), ("compact", self.compact)):
            encoder = "-" if facts.encoder_parameters is None else f"{facts.encoder_parameters:,}"
            sizes = [encoder, f"{facts.parameters:,}", f"{facts.weight_bytes / MEGABYTE:,.1f}"]
            rows.append([name, facts.architecture, facts.attention, *sizes, f"{facts.macs / 1e6:,.1f}"])
        pairs = [
            (getattr(self.dense, name), getattr(self.compact, name))
            for name in ("encoder_parameters", "parameters", "weight_bytes", "macs")
        ]
        ratios = [f"{dense / compact:.2f}x" if dense and compact else "-" for dense, compact in pairs]
        return render_table(headers, [*rows, ["ratio", "", "", *ratios]], align="<<<>>>>")

    def _render_timings(self) -> str:
        headers = ["batch", "model", "latency ms", "p10 - p90", "sentences/s", "tokens/s", "peak MB"]
        rows = []
        for row in self.rows:
            rows.append([str(row.batch_size), "dense", *_cells(row.dense), "", ""])
            rows.append(["", "compact", *_cells(row.compact), describe_speedup(row.speedup), f"{row.achieved:.0%}"])
        return render_table([*headers, "compact is", "achieved"], rows, align="><>>>>>>>")


def _cells(timing: Measurement) -> list[str]:
    return [
        f"{timing.latency_ms:,.2f}",
        f"{timing.p10_ms:,.2f} - {timing.p90_ms:,.2f}",
        f"{timing.sentences_per_s:,.1f}",
        f"{timing.tokens_per_s:,.0f}",
        "-" if timing.peak_bytes is None else f"{timing.peak_bytes / MEGABYTE:,.1f}",
    ]


def describe_speedup(speedup: float) -> str:
    """A ratio of latencies in words: "2.31x faster"; a model that is slower is called slower."""
    rounded = f"{max(speedup, 1 / speedup):.2f}"
    if rounded == "1.00":
        return "as fast"
    return f"{rounded}x {'faster' if speedup > 1 else 'slower'}"
