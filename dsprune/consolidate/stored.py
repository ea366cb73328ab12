"""Shapes of the weights in a model folder, read from the headers of its files: no weight is read, nothing is unpickled.

A folder can hold other shapes than its config.json tells: tools that prune write narrower weights beside the
configuration of the dense model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open

from dsprune.errors import ArchitectureError, ConfigError
from dsprune.structure import Structure

__all__ = ["check_stored_shapes", "stored_shapes"]

Shape = tuple[int, ...]
WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Files of weights, the preferred one first; in several parts, each has an index beside it."""
WRAPPERS = ("_orig_mod.", "module.")
"""What compilation and data parallelism put before names."""


def stored_shapes(folder: Path) -> dict[str, Shape]:
    """Shape of every tensor in a model folder, by its name there; nothing where there are no weights.

    Raises:
        ConfigError: a file of weights that cannot be read.
    """
    shapes: dict[str, Shape] = {}
    for path in _files(folder):
        try:
            shapes |= _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)
        except UnpicklingError as error:
            raise ConfigError(
                f"the weights in {path} cannot be read: it holds more than weights, which could run anything: give "
                "them as model.safetensors"
            ) from error
        except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, AttributeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(f"the weights in {path} cannot be read: {reason}") from error
    return shapes


def _files(folder: Path) -> list[Path]:
    for name in WHOLE:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / part for part in sorted(set(parts)) if (folder / part).is_file()]
    return []


def _of_safetensors(path: Path) -> dict[str, Shape]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _of_pickle(path: Path) -> dict[str, Shape]:
    """On the meta device, and by torch's safe unpickler: what is no tensor is refused, and no number is read."""
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # files from before torch 1.6 are no archives, and cannot be mapped
    state = torch.load(path, map_location="meta", mmap=mapped or None, weights_only=True)
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def check_stored_shapes(what: str, source: str, structure: Structure) -> None:
    """See that the weights of a model folder have the shapes that its configuration tells; hub ids are passed over.

    Heads are left alone: those of another task are replaced.

    Args:
        what: "model" or "teacher".
        source: a folder, or anything else.
        structure: of the model that the configuration describes.

    Raises:
        ArchitectureError: naming the first weight that differs.
        ConfigError: a file of weights that cannot be read.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    stored = {_plain(name): shape for name, shape in stored_shapes(folder).items()}
    expected = {param.name: param.shape for param in structure.params.values() if param.part != "head"}
    differing = _differing(stored, expected, structure.base)
    if not differing:
        return
    name, (theirs, ours) = next(iter(differing.items()))
    more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
    raise ArchitectureError(
        f"{what} '{source}': its weights are not those that its config.json describes: {name} is {list(theirs)} in "
        f"the file and {list(ours)} by the configuration{more}; weights that were pruned already cannot be taken for "
        "a dense model: give the dense one"
    )


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _differing(stored: Mapping[str, Shape], expected: Mapping[str, Shape], base: str) -> dict[str, tuple[Shape, Shape]]:
    """Weights of unlike shapes, by the name in the model: in the file, and expected.

    A file may hold a model with a head or the bare one, whose names lack the first part.
    """
    headed = {} if base else {name.partition(".")[2]: shape for name, shape in stored.items()}
    found = {}
    for name, shape in expected.items():
        theirs = stored.get(name) or stored.get(name.removeprefix(f"{base}.")) or headed.get(name)
        if theirs is not None and theirs != shape:
            found[name] = (theirs, shape)
    return found
