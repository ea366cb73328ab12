"""DeepSpeed's engines: one that trains, one that only answers; and the AdamW of the one that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dsprune.engine.zero.config import offload_device, zero_stage
from dsprune.engine.zero.refusals import refusals
from dsprune.engine.zero.requirements import quiet_import
from dsprune.engine.zero.torch_autocast import forget_autocast

deepspeed = quiet_import()

__all__ = ["adamw", "answering_engine", "training_engine"]


def adamw(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    ds_config: Mapping[str, Any],
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    constant: Callable[[str], bool] = lambda name: False,
) -> torch.optim.Optimizer:
    """AdamW over those of a module's parameters that train, decay kept off biases and norms.

    Where ZeRO offloads the optimizer, DeepSpeed's CPU Adam; else torch's fused one, ten times as fast as the
    unfused on CPU, too.

    Args:
        module: with what is frozen already marked.
        lr: peak learning rate.
        weight_decay: of what decays.
        ds_config: filled configuration of the engine.
        betas: decay of the two moments.
        epsilon: added to the root of the second moment.
        constant: which parameters, by name, make a group of their own, the third: neither warmed up nor decayed.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    apart = [p for name, p in named if constant(name)]
    decayed = [p for name, p in named if not constant(name) and not _is_plain(name)]
    plain = [p for name, p in named if not constant(name) and _is_plain(name)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups += [{"params": apart, "weight_decay": 0.0}] if apart else []
    if offload_device(ds_config, "offload_optimizer") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with refusals(ds_config):
            return DeepSpeedCPUAdam(groups, lr=lr, betas=betas, eps=epsilon, adamw_mode=True)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=epsilon, fused=True)


def _is_plain(name: str) -> bool:
    return name.endswith("bias") or "norm" in name.lower()


def _scale_after_step(optimizer: Any) -> None:
    """Let the loss scale of fp16 grow after a step instead of within it.

    DeepSpeed's ZeRO raises the scale before it divides the gradients by it: they would be half as large in every step
    in which the scale doubles.
    """
    update, step, due = optimizer._update_scale, optimizer.step, []

    def update_now_or_later(has_overflow: bool = False) -> None:
        if has_overflow:
            update(True)
        else:
            due.append(True)

    def step_and_update(closure: Any = None) -> Any:
        done = step(closure)
        if due:
            due.clear()
            update(False)
        return done

    optimizer._update_scale, optimizer.step = update_now_or_later, step_and_update


def training_engine(module: nn.Module, optimizer: torch.optim.Optimizer, ds_config: Mapping[str, Any]) -> Any:
    """A module and its optimizer as an engine. Collective: all ranks must call.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """
    forget_autocast()
    with refusals(ds_config):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(ds_config))
    assert engine.zero_optimization_stage() == zero_stage(ds_config)
    if engine.fp16_enabled():
        _scale_after_step(engine.optimizer)
    engine.checked_config = ds_config  # with its file's name; the engine's own copy goes into every checkpoint
    return engine


def answering_engine(module: nn.Module, ds_config: Mapping[str, Any]) -> Any:
    """A module that only runs forward as an engine, in evaluation mode. Collective: all ranks must call.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """
    forget_autocast()
    with refusals(ds_config):
        engine, *_ = deepspeed.initialize(model=module, config=dict(ds_config))
    engine.eval()  # returns nothing, other than of a module
    engine.checked_config = ds_config
    return engine
