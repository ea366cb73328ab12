"""Everything that can be known to be wrong before training starts, found before training starts."""

from dsprune.run.preflight.checking import Preflight, build_method, check_output, dense_skeleton, preflight

__all__ = ["Preflight", "build_method", "check_output", "dense_skeleton", "preflight"]
