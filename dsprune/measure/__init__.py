"""What is measured and shown: speed against the dense model, what was kept, pictures, tables. No DeepSpeed."""

from dsprune.measure.bench import BenchReport, bench_models
from dsprune.measure.plots import plot_run
from dsprune.measure.tables import render_table

__all__ = ["BenchReport", "bench_models", "plot_run", "render_table"]
