"""Running a model whose weights are not in memory: every module's parameters come just before it computes.

Masked and compact models are compared this way, so that verification needs no more memory than
consolidation itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsprune.consolidate.allocator import give_back
from dsprune.consolidate.writer import names_in
from dsprune.errors import CheckpointError
from dsprune.structure.layout import position_table

__all__ = [
    "TOLERANCE",
    "SafetensorsReader",
    "compare",
    "compare_trained",
    "logits",
    "outputs",
    "record",
    "recorded",
    "sample",
    "shortened",
    "stream_weights",
    "tied_names",
]

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit (at least 1), that rounding may cause in fp32."""
TRAINED_TOLERANCE = 1e-3
"""The same between two devices or attention kernels: where training ran, and where it is verified."""
HALF_TOLERANCE = 0.2
"""Norm of a difference relative to the norm of the logits that training in half precision may cause. Coarse, as deep
models round a lot; another head or a permuted one is further away."""
RECORDED = "trained_logits.safetensors"
"""File of a checkpoint with what the live engine said when it was saved."""
SHORT_TOKENS = 32
SAMPLED_PLACES = 4
"""What is recorded: the first tokens of each example, and of token outputs a few places. With a large vocabulary all
outputs of a batch take gigabytes."""

Reader = Callable[[str], Tensor]


class SafetensorsReader:
    """Reads tensors of a model folder by name, mapped from the files."""

    def __init__(self, folder: Path) -> None:
        self._where = names_in(sorted(folder.glob("*.safetensors")))

    def names(self) -> set[str]:
        return set(self._where)

    def __call__(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.float() if tensor.is_floating_point() else tensor


def stream_weights(model: nn.Module, read: Reader) -> None:
    """Let a model on the meta device fetch each module's own parameters when it runs, and drop them after.

    What is tied is read by the name of the parameter that it is tied to.
    """
    stored = {param: name for name, param in model.named_parameters()}
    reader, table = position_table(model) or (None, None)
    for module in model.modules():
        names = {name: stored[param] for name, param in module.named_parameters(recurse=False)}
        if names:
            called = reader if module is table and reader is not None else module
            called.register_forward_pre_hook(_fetch(module, names, read))
            called.register_forward_hook(_drop(module, list(names)))


def tied_names(model: nn.Module) -> set[str]:
    """Names under which parameters stand in a model a second time."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def _fetch(owner: nn.Module, names: Mapping[str, str], read: Reader) -> Any:
    def hook(_module: nn.Module, _args: Any) -> None:
        for name, source in names.items():
            value = read(source)
            setattr(owner, name, nn.Parameter(value, requires_grad=False))

    return hook


def _drop(owner: nn.Module, names: list[str]) -> Any:
    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        for name in names:
            value = getattr(owner, name)
            setattr(owner, name, nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False))
        del value
        give_back()

    return hook


def outputs(given: Any) -> Tensor:
    """What a model gives out, as one tensor: its first output, for spans start and end side by side."""
    if hasattr(given, "end_logits"):
        return torch.stack([given.start_logits, given.end_logits], -1)
    first: Tensor = given[0]
    return first


def shortened(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first tokens of a batch: [batch, at most `SHORT_TOKENS`] each."""
    return {name: tensor[:, :SHORT_TOKENS].contiguous() for name, tensor in batch.items()}


def sample(logits: Tensor) -> Tensor:
    """A few places of outputs, [batch, places, n], or outputs without places, [batch, n]; fp32 on the CPU."""
    if logits.dim() == 3:
        places = torch.linspace(0, logits.shape[1] - 1, min(SAMPLED_PLACES, logits.shape[1])).long()
        logits = logits[:, places.to(logits.device)]
    return logits.float().cpu().contiguous()


def record(checkpoint: Path, logits: Tensor) -> None:
    """Write what the live engine says on `shortened` examples, `sample`d, into a checkpoint."""
    save_file({"logits": logits}, str(checkpoint / RECORDED))


def recorded(checkpoint: Path) -> Tensor | None:
    """What the live engine said; None where an older version saved the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = checkpoint / RECORDED
    if not path.exists():
        return None
    try:
        return load_file(str(path))["logits"]
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


@torch.inference_mode()
def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Outputs of a model on a batch, fp32.

    Raises:
        CheckpointError: the batch is not one for this model.
    """
    try:
        return outputs(model(**batch)).float()
    except (IndexError, TypeError) as error:
        raise CheckpointError(f"the batch to verify on does not fit the model: {error}") from error


def compare(ours: Tensor, theirs: Tensor, what: str, *, tolerance: float | None = TOLERANCE) -> float:
    """Largest absolute difference.

    Args:
        ours: logits of what was written.
        theirs: logits of what was trained.
        what: names the two in the error.
        tolerance: allowed difference, relative to the largest of `theirs` (at least 1); None allows any.

    Raises:
        CheckpointError: not finite, or beyond the tolerance.
    """
    if not ours.isfinite().all():
        raise CheckpointError(f"{what}: the logits are not finite")
    difference = float((ours - theirs).abs().max())
    if tolerance is not None and difference > tolerance * max(1.0, float(theirs.abs().max())):
        raise CheckpointError(f"{what}: logits differ by {difference:.2e}; nothing was exported")
    return difference


def compare_trained(ours: Tensor, theirs: Tensor, precision: str) -> None:
    """See that what was written says what the live engine said.

    Args:
        ours: `sample` of what was written.
        theirs: recorded.
        precision: fp32, or the half precision that either ran in.

    Raises:
        CheckpointError: it says something else.
    """
    what = "trained and written model"
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{what}: outputs are {list(theirs.shape)} and {list(ours.shape)}; nothing was exported")
    if precision == "fp32":
        compare(ours, theirs, what, tolerance=TRAINED_TOLERANCE)
        return
    difference = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-6))
    if not difference <= HALF_TOLERANCE:
        raise CheckpointError(f"{what}: logits differ by {difference:.0%} of their size; nothing was exported")
