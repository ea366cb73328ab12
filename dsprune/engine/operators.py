"""DeepSpeed's operators that are compiled at first use: the one that is needed, and the one that is not."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from dsprune.engine.requirements import quiet_import
from dsprune.errors import ConfigError

deepspeed = quiet_import()

__all__ = ["build_cpu_adam", "skip_shared_memory"]


def skip_shared_memory() -> None:
    """Start without the operator that sums over ranks in shared memory: inference alone uses it.

    DeepSpeed compiles it whenever ranks meet on CPUs, which takes a minute and a compiler.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def build_cpu_adam() -> None:
    """Compile the Adam that runs where the optimizer is offloaded, unless that was done before.

    torch guards a compilation by a file that a killed process leaves behind, and that every later launch would then
    wait for, forever. Here the kernel guards it, and what a dead process left is removed.

    Raises:
        ConfigError: there is no compiler.
    """
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(f"an offloaded optimizer is compiled at first use and needs {' and '.join(missing)}")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        (folder / CPUAdamBuilder.NAME / "lock").unlink(missing_ok=True)
        CPUAdamBuilder().load(verbose=False)
