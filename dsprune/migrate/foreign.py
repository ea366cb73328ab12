"""Files that other code wrote: a configuration, and tensors by name; nothing that would have to be run is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsprune.errors import CheckpointError, ConfigError
from dsprune.files import first_line

__all__ = ["Foreign", "open_foreign", "read_tensors"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Where transformers keeps a model's weights."""
OTHERS = ("zs.pt", "l0_module.pt", "optimizer.pt", "scheduler.pt", "scaler.pt")
"""Files of tensors or objects that lie beside weights."""
OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}
"""Of norms, in weights that were converted from TensorFlow."""


@dataclass(frozen=True)
class Foreign:
    """A model as it was found.

    Attributes:
        folder: where it is.
        path: of its weights.
        config: its config.json.
        weights: tensors by name, on the CPU.
    """

    folder: Path
    path: Path
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def open_foreign(source: str | Path, config: str | Path | None = None) -> Foreign:
    """Read a folder, or one file of weights in it.

    Args:
        source: the folder, or the file where there are several.
        config: config.json, where it is not in the folder.

    Raises:
        ConfigError: nothing is there, or several files could be meant.
        CheckpointError: a file that cannot be read.
    """
    source = Path(source)
    folder = source.parent if source.is_file() else source
    if not folder.is_dir():
        raise ConfigError(f"'{source}' does not exist: give the folder of a model, or its file of weights")
    path = source if source.is_file() else _find_weights(folder)
    weights = read_tensors(path)
    prefix = "module." if all(name.startswith("module.") for name in weights) else ""
    return Foreign(
        folder,
        path,
        _read_config(Path(config) if config is not None else folder / "config.json"),
        {_present_name(name.removeprefix(prefix)): tensor for name, tensor in weights.items()},
    )


def _find_weights(folder: Path) -> Path:
    known = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    others = sorted(path for path in folder.glob("*.pt") if path.name not in OTHERS)
    found = known[:1] or others
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ConfigError(f"'{folder}' holds no weights ({', '.join(WEIGHTS)} or one .pt): there is {there}")
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ConfigError(f"'{folder}' holds {names}: give the file that is meant")
    return found[0]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {path}: give the model's configuration with --config") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not the configuration of a model: it holds no table")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a safetensors file or of one that torch pickled; no code in it is run.

    Raises:
        CheckpointError: it is damaged, or holds anything but named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # a damaged pickle fails in any way there is
        raise CheckpointError(
            f"{path} cannot be read: it is damaged, or holds objects whose code would have to be run, which is never "
            f"done ({first_line(error)})"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} does not hold tensors by name, but {_kind(found)}")
    return {str(name): tensor.detach() for name, tensor in found.items()}


def _kind(found: Any) -> str:
    if not isinstance(found, Mapping):
        return "nothing" if found is None else f"a {type(found).__name__}"
    name, value = next((name, value) for name, value in found.items() if not isinstance(value, Tensor))
    return f"a {type(value).__name__} as '{name}'"


def _present_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and that there are more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
