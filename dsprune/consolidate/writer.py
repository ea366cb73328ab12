"""Writing safetensors as a stream: the header first, from shapes alone, then one tensor after the other.

The library's own writer wants all tensors in memory at once. The format (a length, a JSON header, the
bytes) is fixed and small; https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsprune.dtypes import DTYPES, torch_dtype

__all__ = ["SafetensorsStream"]

_CODES = {torch_dtype(name): dtype.code for name, dtype in DTYPES.items()} | {torch.int32: "I32"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class _File:
    path: Path
    names: list[str]


class SafetensorsStream:
    """Writes `model.safetensors`, or several numbered files with an index, tensor by tensor.

    Args:
        folder: where to write.
        shapes: name and shape of every tensor, in the order in which `write` will get them.
        dtype: of all tensors but those in `dtypes`.
        dtypes: of single tensors, by name.
        max_bytes: size above which a new file is begun.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        dtypes: Mapping[str, torch.dtype] | None = None,
        max_bytes: int = 5 * 10**9,
    ) -> None:
        self.folder = folder
        self.shapes = dict(shapes)
        self.dtypes = {name: (dtypes or {}).get(name, dtype) for name in shapes}
        self.total_bytes = sum(self._bytes(name) for name in shapes)
        self._files = self._plan(max_bytes)
        self._pending = [(file, name) for file in self._files for name in file.names]
        self._open: _File | None = None

    def _bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def _plan(self, max_bytes: int) -> list[_File]:
        groups: list[list[str]] = [[]]
        size = 0
        for name in self.shapes:
            if groups[-1] and size + self._bytes(name) > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += self._bytes(name)
        if len(groups) == 1:
            return [_File(self.folder / "model.safetensors", groups[0])]
        paths = [self.folder / f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        return [_File(path, names) for path, names in zip(paths, groups, strict=True)]

    def _begin(self, file: _File) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in file.names:
            end = offset + self._bytes(name)
            header[name] = {
                "dtype": _CODES[self.dtypes[name]],
                "shape": list(self.shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._stream = file.path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._open = file

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        file, expected = self._pending.pop(0)
        assert name == expected, f"{name} written where {expected} was due"
        assert tuple(tensor.shape) == self.shapes[name], f"{name}: {tuple(tensor.shape)} is not {self.shapes[name]}"
        if file is not self._open:
            self._close()
            self._begin(file)
        data = tensor.to(self.dtypes[name]).contiguous().flatten().view(torch.uint8)
        self._stream.write(memoryview(data.numpy()))  # type: ignore[arg-type]

    def _close(self) -> None:
        if self._open is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._open = None

    def finish(self) -> None:
        """Close the last file; write the index where there are several."""
        assert not self._pending, f"{len(self._pending)} tensors were not written"
        self._close()
        if len(self._files) > 1:
            where = {name: file.path.name for file in self._files for name in file.names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._close()


def names_in(files: Iterable[Path]) -> dict[str, Path]:
    """Which of some safetensors files holds each tensor."""
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    return where
