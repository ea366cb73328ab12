"""DeepSpeed's operators that are compiled at first use: those that are needed, and the one that is not."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsprune.engine.zero.config import OFFLOADED, offload_device
from dsprune.engine.zero.requirements import quiet_import
from dsprune.errors import ConfigError

deepspeed = quiet_import()

__all__ = ["build_operators", "skip_shared_memory"]


def skip_shared_memory() -> None:
    """Start without the operator that sums over ranks in shared memory: inference alone uses it.

    DeepSpeed compiles it whenever ranks meet on CPUs, which takes a minute and a compiler.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def build_operators(*ds_configs: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Compile what offloading needs, unless that was done before: Adam on the CPU, and asynchronous I/O for NVMe.

    torch guards a compilation by a file that a killed process leaves behind, and that every later launch would then
    wait for, forever. Here the kernel guards it, and what a dead process left is removed.

    Args:
        ds_configs: of all engines of this launch.
        say: told of a compilation before it begins.

    Raises:
        ConfigError: there is no compiler.
    """
    builders = _needed(ds_configs)
    if not builders:
        return
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(f"offloading is compiled at first use and needs {' and '.join(missing)}")
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for builder in builders:
            (folder / builder.NAME / "lock").unlink(missing_ok=True)
            if not (folder / builder.NAME / f"{builder.NAME}.so").exists():
                say(f"compiling DeepSpeed's {builder.NAME} for offloading: about a minute, once on this machine")
            builder.load(verbose=False)


def _needed(ds_configs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Builders of the operators that these configurations offload with."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    devices = {part: {offload_device(config, part) for config in ds_configs} for part in OFFLOADED}
    needed = [CPUAdamBuilder()] if devices["offload_optimizer"] - {"none"} else []
    return [*needed, AsyncIOBuilder()] if "nvme" in set().union(*devices.values()) else needed
