"""The keys that DeepSpeed knows, asked of DeepSpeed: fields of its models, and what its parsers look up.

A configuration that notes what it is asked for is handed to DeepSpeed's own reader, first empty, then with every key
that was asked for, as a section that notes likewise.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

Path = tuple[str, ...]
MISSPELT = "no_such_key"
DEEPEST = 5


class Noting(dict[str, Any]):
    """A dictionary that notes which keys it is asked for, under the path at which it stands."""

    def __init__(self, content: dict[str, Any], path: Path, asked: set[Path]) -> None:
        super().__init__(content)
        self.path = path
        self.asked = asked

    def _note(self, key: Any) -> None:
        if isinstance(key, str):
            self.asked.add((*self.path, key))

    def __contains__(self, key: Any) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self._note(key)
        return super().pop(key, *default)

    def keys(self) -> Any:
        return _Keys(self)

    def __copy__(self) -> Noting:
        return Noting(self, self.path, self.asked)

    def __deepcopy__(self, memo: Any) -> Noting:
        return self.__copy__()


class _Keys:
    def __init__(self, noting: Noting) -> None:
        self.noting = noting

    def __contains__(self, key: Any) -> bool:
        return key in self.noting

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.noting))

    def __len__(self) -> int:
        return len(dict(self.noting))


def _nested(path: Path, asked: set[Path], content: dict[str, Any]) -> Noting:
    """A configuration with a section at a path, and in it some content."""
    top = Noting({"train_batch_size": 1}, (), asked)
    node = top
    for depth, key in enumerate(path, 1):
        inner = Noting(content if depth == len(path) else {}, path[:depth], asked)
        dict.__setitem__(node, key, inner)
        node = inner
    return top


def _read(config: dict[str, Any]) -> Exception | None:
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(config)
    except Exception as error:  # a section where a number belongs; what was asked for before is noted
        return error
    return None


def _model(path: Path) -> type[BaseModel] | None:
    """The model that reads a section, which names itself where it meets a key that it does not have."""
    error = _read(_nested(path, set(), {MISSPELT: 1}))
    if not isinstance(error, ValidationError):
        return None
    places = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden" and e["loc"][-1] == MISSPELT]
    if not places:
        return None
    model: type[BaseModel] = {cls.__name__: cls for cls in _subclasses(BaseModel)}[error.title]
    for name in places[0][:-1]:
        model = next(_models_in(model.model_fields[str(name)].annotation))
    return model


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _models_in(part)


def _fields(model: type[BaseModel], path: Path) -> Iterator[Path]:
    for name, field in model.model_fields.items():
        for known in {name, field.alias or name}:
            yield (*path, known)
            for inner in _models_in(field.annotation):
                yield from _fields(inner, (*path, known))


def known_keys() -> set[str]:
    """Dotted paths of all keys that DeepSpeed's reader knows."""
    asked: set[Path] = set()
    _read(_nested((), asked, {}))
    done: set[Path] = set()
    while new := sorted(path for path in asked - done if len(path) < DEEPEST):
        for path in new:
            done.add(path)
            model = _model(path)
            if model is not None:
                fields = set(_fields(model, path))
                asked |= fields
                done |= fields
            else:
                # Some parsers pass over an empty section.
                for content in ({}, {MISSPELT: 1}):
                    _read(_nested(path, asked, content))
    return {".".join(path) for path in asked}


def keys_of_an_engine() -> set[str]:
    """Dotted paths of all keys that starting an engine looks up, whole and sharded. Runs inside a rank."""
    import deepspeed
    import torch

    asked: set[Path] = set()
    for stage in (0, 3):
        zero = Noting({"stage": stage}, ("zero_optimization",), asked)
        config = Noting({"train_batch_size": 1, "zero_optimization": zero}, (), asked)
        model = torch.nn.Linear(4, 4)
        deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    return {".".join(path) for path in asked}
