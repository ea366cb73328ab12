"""Weights that do not train, in a checkpoint: one stream of safetensors, whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsprune.consolidate.writer import SafetensorsStream
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.gather import gathered
from dsprune.structure.spaces import param_shape

__all__ = ["save_still_weights"]


def _tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and the buffers that belong to a model's state."""
    yield from engine.module.named_parameters()
    kept = engine.module.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in engine.module.named_buffers() if name in kept)


def save_still_weights(engine: Any, folder: Path, world: World) -> None:
    """Write the weights of an engine without an optimizer, one tensor at a time. Collective: all ranks must call.

    A rank that cannot write stays in step with the others, and says so after.

    Raises:
        OSError: the first rank could not write.
    """
    tensors = dict(_tensors(engine))
    shapes = {name: param_shape(tensor) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    failed: OSError | None = None
    stream = None
    if world.is_main:
        folder.mkdir()
        stream = SafetensorsStream(folder, shapes, torch.float32, dtypes=dtypes)
    for name, tensor in tensors.items():
        with gathered(tensor):
            if stream is None or failed is not None:
                continue
            try:
                stream.write(name, tensor.detach().cpu())
            except OSError as error:
                failed = error
    if failed is not None:
        raise failed
    if stream is not None:
        stream.finish()
