"""Compact models of any selection with random weights: the classes that serve, of which only the time matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dsprune.consolidate.compact import compact_config, without_weights
from dsprune.errors import ConfigError
from dsprune.pretrained import read_model_config
from dsprune.structure import Selection, Structure, analyze, ones

__all__ = ["DenseModel"]

STD = 0.02
"""Of random weights: activations stay of the size that they have in trained models."""


@dataclass
class DenseModel:
    """A dense model without weights, and how compact ones are made from it.

    Attributes:
        config: its config.json.
        structure: its structure.
    """

    config: dict[str, Any]
    structure: Structure
    _around: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, source: str, *, head: str | None = None) -> DenseModel:
        """By folder or hub id, from its configuration alone.

        Args:
            source: folder or hub id.
            head: what the model's class ends with, such as `ForSequenceClassification`; by default its own.

        Raises:
            ConfigError: no such model, one that is compact already, or no such head.
            ArchitectureError: no family covers it.
        """
        config = read_model_config(source)
        tree = config.to_dict()
        if "dsprune" in tree:
            raise ConfigError(f"{source} is a compact model: a latency table is that of the dense one")
        names = tree.get("architectures") or []
        if head is not None or not names:
            names = [_class_name(config, head or "Model")]
        return cls.of(tree | {"architectures": names[:1]})

    @classmethod
    def of(cls, config: dict[str, Any]) -> DenseModel:
        """From a dense config.json, whose architecture is named.

        Raises:
            ArchitectureError: no family covers it.
        """
        return cls(config, analyze(without_weights(config)))

    def whole(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """What compact ones are timed beside: nothing is taken, so that it is the stock class."""
        return self.compact(Selection.from_gates(self.structure, ones(self.structure)), device, dtype)

    def compact(self, selection: Selection, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model that would be exported, with random weights, in eval mode.

        What stands outside the layers is shared by all models of one width.
        """
        structure = self.structure
        model: Any = without_weights(compact_config(self.config, structure, selection))
        layers = {f"{path.rpartition('.')[0]}." for path in structure.layer_paths}
        for name, param in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            key = (name, tuple(param.shape))
            value = self._around.get(key)
            if value is None or value.device != device or value.dtype != dtype:
                value = torch.empty(param.shape, dtype=dtype, device=device)
                value = value.normal_(std=STD) if value.dim() > 1 else value.fill_(1)
                if not any(name.startswith(path) for path in layers):
                    self._around[key] = value
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        model.tie_weights()
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))
        return model.eval()  # type: ignore[no-any-return]


def _class_name(config: Any, head: str) -> str:
    """The class of a configuration's family that ends with a head."""
    stem = type(config).__name__.removesuffix("Config")
    name = f"{stem}{head}"
    if not hasattr(transformers, name):
        raise ConfigError(f"there is no {name} in transformers: give --head another ending, such as ForCausalLM")
    return name
