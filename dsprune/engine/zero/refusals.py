"""Whatever DeepSpeed raises where it reads or meets its configuration, as one line that names the section."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dsprune.errors import ConfigError, DspruneError

__all__ = ["in_words", "pydantic_words", "raised_by_deepspeed", "refusals"]

LONGEST = 300
"""Characters of DeepSpeed's words that are told."""
MODELS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "CommsLoggerConfig": "comms_logger",
    "DeepSpeedThroughputTimerConfig": "timers.throughput",
}
"""DeepSpeed's own names of sections."""
PLACES = {
    "runtime/swap_tensor": "aio",
    "ops/aio": "aio",
    "nvme": "aio",
    "runtime/fp16": "fp16",
    "runtime/bf16_optimizer.py": "bf16",
    "runtime/precision_config.py": "bf16",
    "runtime/checkpoint_engine": "checkpoint",
    "runtime/model_checkpointing": "checkpoint",
    "profiling/flops_profiler": "flops_profiler",
    "monitor/tensorboard.py": "tensorboard",
    "monitor/csv_monitor.py": "csv_monitor",
    "comm": "comms_logger",
    "utils/comms_logging.py": "comms_logger",
    "runtime/zero": "zero_optimization",
}
"""Where in DeepSpeed's source which section is at work; the first that fits counts."""
LOST_PEER_SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "imed out")
"""What a collective says whose other end is gone."""
PASSED_THROUGH = ("torch", "pydantic", "pydantic_core")
"""Packages that raise what those who call them are to blame for."""
GRAPH = "autograd/graph.py"
"""Where torch runs a graph backward: operators without Python in them fail right there, whoever made the graph."""
STANDARD = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
ELSEWHERE = "elsewhere"
"""In the place of a package, of code that is in none: a checkout, a script."""


def in_words(error: BaseException) -> str:
    """An error's message on one line."""
    words = " ".join(str(error).split())
    if len(words) > LONGEST:
        words = f"{words[:LONGEST]} ..."
    return words or type(error).__name__


def pydantic_words(error: BaseException, section: str = "") -> list[str]:
    """A line for each value that one of DeepSpeed's models refuses; none for another error.

    Args:
        error: whatever was raised.
        section: that the model reads; by default as DeepSpeed's names have it.
    """
    if not isinstance(error, ValidationError):
        return []
    section = MODELS.get(error.title, section)
    return [f"'{'.'.join([*filter(None, [section]), *map(str, e['loc'])])}': {e['msg']}" for e in error.errors()]


@contextmanager
def refusals(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Where DeepSpeed meets its configuration: at `initialize`, while weights are loaded, at a first step.

    Args:
        ds_config: the configuration that is at work in the block.

    Raises:
        ConfigError: one line, naming file and section, with DeepSpeed's words, for whatever DeepSpeed raises in the
            block, and where something else in the block took that for an error of its own. All other errors, of
            dsprune, of torch out of memory or of a lost peer, are raised as they are.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ConfigError) and error.__cause__ is not None else error
        if not _is_refusal(cause):
            raise
        raise ConfigError(*describe(cause, ds_config)) from cause


def _is_refusal(error: BaseException) -> bool:
    lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER_SIGNS)
    harmless = isinstance(error, DspruneError | torch.OutOfMemoryError) or lost
    return not harmless and raised_by_deepspeed(error)


def _deepspeed_frames(error: BaseException) -> list[str]:
    """Files of DeepSpeed's that an error came through, as paths in its package, the innermost first.

    Empty where the innermost file, those of torch and of the standard library apart, is not DeepSpeed's.
    """
    found: list[str] = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        package, path = _place(frame.filename)
        if package == "deepspeed":
            found.append(path)
        elif not found and package not in (None, *PASSED_THROUGH):
            return []
    return found


def _place(filename: str) -> tuple[str | None, str]:
    """Package that a file belongs to, None for the standard library and for no file, and its path in there."""
    file = Path(filename)
    for root in ("site-packages", "dist-packages"):
        if root in file.parts:
            inside = file.parts[len(file.parts) - file.parts[::-1].index(root) :]
            return inside[0], "/".join(inside[1:])
    known = filename.startswith("<") or any(folder in file.parents for folder in STANDARD)
    return (None if known else ELSEWHERE), filename


def raised_by_deepspeed(error: BaseException) -> bool:
    """Whether DeepSpeed raised an error, or called what raised it."""
    return bool(_deepspeed_frames(error))


def describe(error: BaseException, ds_config: Mapping[str, Any]) -> list[str]:
    """Lines that tell what DeepSpeed raised."""
    source = getattr(ds_config, "source", "the DeepSpeed configuration")
    told = pydantic_words(error)
    if told:
        return [f"{source}: {line}" for line in told]
    section = _section(error, ds_config)
    where = f"'{section}': " if section else ""
    # An assertion may say nothing at all.
    words = in_words(error) if str(error) else f"in {next(iter(_deepspeed_frames(error)), 'deepspeed')}"
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    what = "its backward pass fails" if _place(innermost) == ("torch", GRAPH) else "DeepSpeed refuses it"
    return [f"{source}: {where}{what}: {words} ({type(error).__name__})"]


def _section(error: BaseException, ds_config: Mapping[str, Any]) -> str:
    """The section that an error is about: a key that its message names, or where in DeepSpeed it was raised."""
    words = str(error)
    named = [path for path in _paths(ds_config) if path.rpartition(".")[2] in words and "_" in path]
    if named:
        return max(named, key=lambda path: len(path.rpartition(".")[2]))
    for file in _deepspeed_frames(error):
        for place, section in PLACES.items():
            if file.startswith(place) and section in ds_config:
                return section
    return "zero_optimization" if "zero_optimization" in ds_config else ""


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
