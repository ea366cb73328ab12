"""Everything that can be known to be wrong before training starts, found before training starts."""

from dsprune.run.preflight.checking import Preflight, build_method, check_output, dense_skeleton, preflight
from dsprune.run.preflight.timing import bench_as_asked, dense_model, hold_to_time, measure_speedup

__all__ = [
    "Preflight",
    "bench_as_asked",
    "build_method",
    "check_output",
    "dense_model",
    "dense_skeleton",
    "hold_to_time",
    "measure_speedup",
    "preflight",
]
