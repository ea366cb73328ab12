"""Parameters as a whole, wherever ZeRO-3 keeps their parts; and how they get there."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dsprune.engine.zero.config import zero_stage
from dsprune.engine.zero.refusals import refusals
from dsprune.engine.zero.requirements import quiet_import
from dsprune.engine.zero.teardown import forget_engine

__all__ = ["gathered", "let_go", "partitioned_loading", "register_external", "release", "whole"]


@contextmanager
def partitioned_loading(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, let weights go straight into partitions while they are loaded."""
    if zero_stage(ds_config) != 3:
        yield
        return
    quiet_import()
    keep = HfDeepSpeedConfig(dict(ds_config))
    try:
        # Outside of what reads the model: what DeepSpeed refuses is no fault of the model's.
        with refusals(ds_config):
            yield
    finally:
        del keep
        unset_hf_deepspeed_config()


@contextmanager
def gathered(*weights: Tensor, rewritten: bool = False) -> Iterator[bool]:
    """Parameters as a whole, wherever ZeRO-3 keeps their parts. Collective under ZeRO-3.

    Args:
        weights: parameters.
        rewritten: let one rank write to them, for all.

    Yields:
        Whether this rank is to write.
    """
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield rewritten
        return
    with quiet_import().zero.GatheredParameters(list(weights), modifier_rank=0 if rewritten else None):
        yield rewritten and torch.distributed.get_rank() == 0


def whole(model: nn.Module, name: str) -> Tensor:
    """Copy of one parameter on the CPU, fp32. Collective under ZeRO-3."""
    param = model.get_parameter(name)
    with gathered(param):
        value: Tensor = param.detach().float().cpu().clone()
    return value


def let_go(engine: Any) -> None:
    """Partition what a backward pass that stopped at the gates left whole, where no training pass follows.

    DeepSpeed lets go of a module's weights when the gradient of its input is there. The first gated module has an
    input that nobody asks a gradient of, and its weights would never be let go of.
    """
    if engine.zero_optimization_stage() == 3:
        getattr(engine.optimizer, "parameter_offload", engine.optimizer).partition_all_parameters()


def register_external(reader: nn.Module, weight: Tensor) -> None:
    """Tell ZeRO-3 that a module reads a parameter of another, without calling that."""
    quiet_import().zero.register_external_parameter(reader, weight)


def release(*objects: Any) -> None:
    """Free what engines hold before the next stage; the caller drops its own references as well."""
    for item in objects:
        if hasattr(item, "destroy"):
            item.destroy()
            forget_engine(item)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
