"""DeepSpeed's `torch_autocast`: weights in fp32, torch's linears in bf16. Where it makes sense, and its loose ends.

DeepSpeed puts autocast around the engine's own forward pass alone, and keeps in a global variable that some engine
of the process asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from dsprune.engine.zero.config import precision
from dsprune.engine.zero.requirements import quiet_import
from dsprune.errors import ConfigError

__all__ = ["autocasting", "check_autocast", "forget_autocast"]


def autocasting(engine: Any) -> AbstractContextManager[None]:
    """Autocast as the engine's configuration has it, for a pass through its module and not through itself."""
    quiet_import()
    from deepspeed.runtime.torch_autocast import autocast_if_enabled

    return autocast_if_enabled(engine)  # type: ignore[no-any-return]


def forget_autocast() -> None:
    """Let the next engine of this process decide for itself; to be called before each is made."""
    quiet_import()
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    torch_autocast.TORCH_AUTOCAST_DTYPE = None


def check_autocast(where: str, config: Mapping[str, Any]) -> None:
    """Refuse autocast where it does nothing, or what gates cannot follow.

    Args:
        where: key of the recipe that names the configuration.
        config: checked DeepSpeed configuration.

    Raises:
        ConfigError: beside bf16 or fp16, or in another dtype than bf16.
    """
    table = config.get("torch_autocast", {})
    if not isinstance(table, Mapping) or table.get("enabled") is not True:
        return
    kind = precision(config)
    if kind != "fp32":
        raise ConfigError(
            f"{where}: torch_autocast and {kind} are both enabled: with {kind} the weights are in half precision "
            "already, and autocast changes nothing: leave out one of the two"
        )
    dtype = str(table.get("dtype", "none"))
    if dtype.removeprefix("torch.") not in ("bfloat16", "bf16"):
        raise ConfigError(
            f"{where}: torch_autocast.dtype is {dtype}: say 'bfloat16'; float16 needs losses that are scaled, and "
            "nobody would scale the gradients of the gates back"
        )
