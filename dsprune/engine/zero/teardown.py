"""What DeepSpeed keeps of an engine that was destroyed: under ZeRO-3, all of it, in two places of the process.

Weights, gradients and moments of every stage would stay until the run ends.
"""

from __future__ import annotations

from typing import Any

from dsprune.engine.zero.requirements import quiet_import

__all__ = ["forget_engine"]


def forget_engine(engine: Any) -> None:
    """Let a destroyed engine go, so that the next collection of garbage frees its memory.

    Its module stays on the stack of modules that run, where ZeRO-3 puts each root for good; and a cache without bounds
    has it, and all that belongs to it, as a key. That cache may be emptied at any time: it is filled again when needed.
    """
    quiet_import()
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    # The name is private to its class, and the cached function is what a decorator wraps.
    wrapper = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for cell in getattr(wrapper, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
