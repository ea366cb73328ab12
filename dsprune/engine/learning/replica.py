"""The replicated state beside the engine: a method's parameters, the same bits on every rank.

Everything that must be known globally once a step travels in one flat float32 all-reduce: gate
gradients, layer distances, losses, and whether all of it is finite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsprune.engine.ranks.world import World
from dsprune.errors import CheckpointError, NumericsError
from dsprune.methods import AnyMethod, load_state, state_of
from dsprune.methods.parts import Learned, optimizers_of

__all__ = ["Reduced", "Replica", "reduce_flat"]


@dataclass
class Reduced:
    """Means over ranks, on the CPU."""

    tensors: dict[str, Tensor]
    finite: bool


def reduce_flat(world: World, tensors: Mapping[str, Tensor]) -> Reduced:
    """Mean over ranks of several tensors, in one all-reduce. Collective: all ranks must call.

    The sum of a value that is not finite is not finite, so every rank learns of it. It is formed in float32, or in
    float64 where any of the tensors is.
    """
    wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if wide else torch.float32
    flat = torch.cat([tensor.detach().to(world.device, dtype).flatten() for tensor in tensors.values()])
    flat = (world.sum_(flat, "summing gate gradients and losses") / world.size).cpu()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
    means = {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
    return Reduced(means, bool(flat.isfinite().all()))


class Replica:
    """A method's parameters and optimizers on this rank.

    Lives on the CPU whatever the device: a few hundred kilobytes, with the same arithmetic everywhere.
    """

    def __init__(self, method: AnyMethod) -> None:
        self.method = method
        self._graph: dict[str, Tensor] | None = None

    def gates(self, step: int, device: torch.device) -> dict[str, Tensor] | None:
        """Leaf copies of the method's gates for the forward passes of one step; None for the dense model.

        They ask for gradients where the method wants any.
        """
        self._graph = self.method.gates(step)
        if self._graph is None:
            return None
        wanted = self.method.evidence(step) not in ("none", "loss")
        return {kind: gate.detach().to(device, copy=True).requires_grad_(wanted) for kind, gate in self._graph.items()}

    @property
    def current(self) -> dict[str, Tensor] | None:
        """The gates of the step under way, on the CPU."""
        return self._graph and {kind: gate.detach() for kind, gate in self._graph.items()}

    def step(self, step: int, seen: Mapping[str, Tensor]) -> None:
        """Apply one step to the method and its optimizers.

        Args:
            step: optimizer step.
            seen: the evidence that the method wanted, globally reduced.
        """
        if self._graph is None:
            return
        self.method.learn(step, self._graph, seen)
        if isinstance(self.method, Learned):
            for optimizer in self.method.optimizers():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.method.after_step()
        self._graph = None

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"method.{name}": value for name, value in state_of(self.method).items()}
        for i, optimizer in enumerate(optimizers_of(self.method)):
            for key, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{key}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        return tensors

    def save(self, path: str) -> None:
        """Write parameters and optimizer state to a safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, path)

    def load(self, path: str) -> None:
        """Restore what `save` wrote.

        Raises:
            CheckpointError: the file holds the state of another method or model.
        """
        tensors = load_file(path)
        state = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
        own = self.method.parameters()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise CheckpointError(f"{path} holds the state of another method or model")
        load_state(self.method, state)
        for i, optimizer in enumerate(optimizers_of(self.method)):
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                kind, *rest = name.split(".")
                if kind == "optimizer" and int(rest[0]) == i:
                    slots.setdefault(int(rest[1]), {})[rest[2]] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})

    def fingerprint(self) -> str:
        """Hash of all bits of the replicated state."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_equal(self, world: World, step: int) -> None:
        """Stop if replicas drifted apart. Collective: all ranks must call.

        Raises:
            NumericsError: naming the ranks that differ from rank 0.
        """
        prints = world.gather(self.fingerprint(), "comparing replicas")
        differing = [rank for rank, value in enumerate(prints) if value != prints[0]]
        if differing:
            raise NumericsError(
                f"step {step}: gates and multipliers on rank {', '.join(map(str, differing))} differ from rank 0's"
            )
