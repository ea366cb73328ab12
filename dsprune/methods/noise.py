"""Pruning noise: a function of (seed, step) alone.

Equal on every rank, device, ZeRO stage and world size, and the same for all accumulation steps of
one optimizer step, so that none of those changes what is learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["stable_seed", "uniform_noise"]


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts, the same on every machine and Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform_noise(shapes: Mapping[str, tuple[int, ...]], seed: int, step: int) -> dict[str, Tensor]:
    """Uniform noise on [0, 1) by name, float32 on the CPU; independent over names and steps."""
    noise = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(stable_seed("gates", seed, step, name))
        noise[name] = torch.rand(shape, generator=generator)
    return noise
