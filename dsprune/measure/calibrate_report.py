"""What a calibration found: curves, the densities at which block-sparse weights pay, and both as text and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsprune.consolidate.modeling_dsprune import shape_class
from dsprune.measure.bench_report import describe_speedup
from dsprune.measure.tables import render_table

__all__ = ["Calibration", "CurvePoint", "break_even"]


@dataclass(frozen=True)
class CurvePoint:
    """Both ways of running one matrix."""

    shape: tuple[int, int]
    """out and in."""
    tokens: int
    """Rows of the input."""
    density: float
    """Share of the blocks that is kept, as it came out."""
    dense_ms: float
    """Median."""
    bsr_ms: float

    @property
    def speedup(self) -> float:
        """Dense over BSR; below 1 BSR is slower."""
        return self.dense_ms / self.bsr_ms


@dataclass(frozen=True)
class Calibration:
    """What was measured for one block size, in one place."""

    device: str
    threads: int
    """CPU threads of torch; 0 on a GPU."""
    dtype: str
    block: tuple[int, int]
    torch: str
    runs: int
    margin: float
    """BSR has to be faster by this share of the dense time."""
    points: tuple[CurvePoint, ...]
    """Densities ascend within a shape and a number of tokens; empty where torch has no kernel."""

    def limits(self) -> dict[tuple[tuple[int, int], int], float]:
        """For each shape and number of tokens, in order, the density up to which BSR pays."""
        curves: dict[tuple[tuple[int, int], int], list[CurvePoint]] = {}
        for point in self.points:
            curves.setdefault((point.shape, point.tokens), []).append(point)
        return {
            case: break_even([p.density for p in curve], [p.speedup * (1 - self.margin) for p in curve])
            for case, curve in curves.items()
        }

    def thresholds(self) -> dict[str, float]:
        """For each class of shapes the density up to which BSR pays, whatever the number of tokens."""
        lowest: dict[str, float] = {}
        for (shape, _), limit in self.limits().items():
            name = shape_class(*shape)
            lowest[name] = min(lowest.get(name, 1.0), round(limit, 4))
        return lowest

    def entry(self) -> dict[str, Any]:
        """What the model reads: an entry of `dsprune.calibration` in config.json."""
        facts = {name: getattr(self, name) for name in ("device", "threads", "dtype", "torch")}
        return {**facts, "block": list(self.block), "thresholds": self.thresholds()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, fit for JSON."""
        points = [asdict(point) | {"shape": list(point.shape), "speedup": point.speedup} for point in self.points]
        return self.entry() | {"runs": self.runs, "margin": self.margin, "points": points}

    def render(self) -> str:
        """The curves as a table, what follows from them, and what they were taken on."""
        device = f"{self.device}, {self.threads} thread(s)" if self.threads else self.device
        title = f"{device}, {self.dtype}, torch {self.torch}, blocks of {self.block[0]} x {self.block[1]}"
        if not self.points:
            return f"{title}: torch has no kernel that works here, weights run dense"
        headers = ["matrix", "tokens", "density", "dense ms", "BSR ms", "BSR is"]
        rows = [
            [
                f"{point.shape[0]} x {point.shape[1]}",
                f"{point.tokens:,}",
                f"{point.density:.1%}",
                f"{point.dense_ms:,.3f}",
                f"{point.bsr_ms:,.3f}",
                describe_speedup(point.speedup),
            ]
            for point in self.points
        ]
        how = f"medians of {self.runs} runs, dense and BSR in turn; BSR pays where it is {self.margin:.0%} faster"
        return "\n".join([title, "", render_table(headers, rows, align="<>>>>>"), "", how, *self._verdicts()])

    def _verdicts(self) -> list[str]:
        verdicts = []
        for (shape, tokens), limit in self.limits().items():
            pays = f"pays up to a density of {limit:.1%}" if limit else "pays at no density measured"
            verdicts.append(f"{shape[0]} x {shape[1]}, {tokens:,} tokens: BSR {pays}")
        return verdicts


def break_even(densities: Sequence[float], gains: Sequence[float]) -> float:
    """The density up to which gains stay above 1: between two measured ones by a straight line, 0 if at none.

    A gain that comes back at a higher density is noise. Nothing is said beyond the highest density.

    Args:
        densities: ascending.
        gains: of each density.
    """
    limit = 0.0
    for i, (density, gain) in enumerate(zip(densities, gains, strict=True)):
        if gain <= 1:
            return limit + (density - limit) * (gains[i - 1] - 1) / (gains[i - 1] - gain) if i else 0.0
        limit = density
    return limit
