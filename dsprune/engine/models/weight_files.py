"""The weights of a model source by name and shape: read from headers, without values and without running code."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from dsprune.errors import ConfigError

__all__ = ["WeightFiles", "find_weights"]

ORDER = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""File names in the order in which `from_pretrained` looks for them."""
OTHER_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
"""Endings of files that hold weights, under names that are not read or in formats that are not."""
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a source.

    Attributes:
        shapes: of each tensor, by its name in the files.
        where: the file of each tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]
    where: Mapping[str, Path]

    def without(self, names: Collection[str]) -> WeightFiles:
        """The tensors but for some."""
        return WeightFiles({name: shape for name, shape in self.shapes.items() if name not in names}, self.where)

    def read(self, name: str) -> Tensor:
        """One tensor, as it was saved."""
        path = self.where[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor
        return _unpickle(path)[name]


def find_weights(
    source: str, revision: str | None = None, *, named: str | None = None, download: bool, hint: str = ""
) -> WeightFiles | None:
    """The weights of a source, as `from_pretrained` would find them.

    Args:
        source: folder or hub id.
        revision: of the hub.
        named: file that the configuration names (`transformers_weights`), if it does.
        download: fetch what is not in the hub's cache.
        hint: what to do where there are no weights, in no format.

    Returns:
        None where nothing may be fetched and the weights are not here yet.

    Raises:
        ConfigError: there are no weights, or none that can be read without running code.
    """
    local = Path(source).is_dir()
    for name in (named, *ORDER) if named else ORDER:
        path = _locate(source, name, revision, download)
        if path is None:
            continue
        shards = [path]
        if name.endswith(".index.json"):
            shards = [_shard(source, shard, revision, download) for shard in _listed(path)]
        return _read_headers(shards)
    if not local and not download:
        return None
    reason = _nothing_found(Path(source), hint) if local else f"neither the hub nor its cache shows any: {NO_WEIGHTS}"
    raise ConfigError(f"cannot load model '{source}': {reason}")


NO_WEIGHTS = f"it has no {SAFE_WEIGHTS_NAME} and no {WEIGHTS_NAME}"


def _locate(source: str, name: str, revision: str | None, download: bool) -> Path | None:
    folder = Path(source)
    if folder.is_dir():
        path = folder / name
        return path if path.is_file() else None
    # Without a connection a file that is not in the cache is one of which nothing is known: the next may be there.
    found = cached_file(
        source,
        name,
        revision=revision,
        local_files_only=not download,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _listed(index: Path) -> list[str]:
    """Names of the files that an index lists."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not the index of a model's weights: it lists no files") from error


def _shard(source: str, name: str, revision: str | None, download: bool) -> Path:
    path = _locate(source, name, revision, download)
    if path is None:
        raise ConfigError(f"cannot load model '{source}': {name} is missing, which its index lists")
    return path


def _nothing_found(folder: Path, hint: str) -> str:
    """What to say of a folder without weights that are read."""
    if (folder / ADAPTER).is_file():
        return f"it holds an adapter alone: merge it into its model, and save that with save_pretrained ({NO_WEIGHTS})"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_FORMATS)
    if others:
        return (
            f"{NO_WEIGHTS}; {others[0]} is not read: load it with the library that wrote it, and save the model with "
            "save_pretrained"
        )
    return NO_WEIGHTS + hint


def _read_headers(paths: list[Path]) -> WeightFiles:
    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, Path] = {}
    for path in paths:
        found = _safe_shapes(path) if path.suffix == ".safetensors" else _shapes(_unpickle(path))
        shapes |= found
        where |= dict.fromkeys(found, path)
    return WeightFiles(shapes, where)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _safe_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: it is damaged or no safetensors file ({error})") from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped where they can be; what would run code is refused.

    Raises:
        ConfigError: it holds something else than named tensors, or is damaged.
    """
    try:
        held: Any = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} holds more than tensors, and opening it would run code: refused. Where you trust it, load the "
            "model with transformers and save it with save_pretrained, which writes model.safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read: it is damaged ({type(error).__name__})") from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        inside = [key for key, value in held.items() if isinstance(value, dict)] if isinstance(held, dict) else []
        hint = f" (its weights may stand under '{inside[0]}')" if inside else ""
        raise ConfigError(f"{path} is no table of named tensors{hint}: save the model with save_pretrained")
    return held
