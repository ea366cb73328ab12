"""What the engine needs of DeepSpeed and of the machine, checked before anything starts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

from packaging.version import Version

from dsprune.errors import ConfigError

__all__ = ["MINIMUM_DEEPSPEED", "check_requirements", "quiet_import"]

MINIMUM_DEEPSPEED = Version("0.19.6")
"""Older versions compute wrong gradients, in silence, where a model returns several tensors and
gradients are accumulated: exactly what distillation does."""


def check_deepspeed_version(installed: str) -> None:
    """Refuse a DeepSpeed that computes wrong gradients.

    Raises:
        ConfigError: `installed` is older than `MINIMUM_DEEPSPEED`.
    """
    if Version(installed) < MINIMUM_DEEPSPEED:
        raise ConfigError(
            f"DeepSpeed {installed} computes wrong gradients under accumulation: install deepspeed>={MINIMUM_DEEPSPEED}"
        )


def _set_extension_cache() -> None:
    """Give each environment its own cache of compiled operators: two that share one break each other."""
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        key = hashlib.blake2b(f"{sys.prefix}|{sys.version}".encode(), digest_size=6).hexdigest()
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        os.environ["TORCH_EXTENSIONS_DIR"] = str(root / "dsprune" / "torch_extensions" / key)


def check_requirements() -> None:
    """Version of DeepSpeed, and where it finds what it compiles with.

    Raises:
        ConfigError: naming what is missing.
    """
    try:
        check_deepspeed_version(importlib.metadata.version("deepspeed"))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("DeepSpeed is not installed: pip install deepspeed") from error
    _set_extension_cache()
    # DeepSpeed looks for ninja on PATH, where the environment's own folder may be missing.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quiet_import() -> ModuleType:
    """DeepSpeed, checked, with its banner lines turned down to warnings."""
    check_requirements()
    if "deepspeed" in sys.modules:
        return sys.modules["deepspeed"]  # its level may have been asked for since: `log_level`
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    module = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return module
