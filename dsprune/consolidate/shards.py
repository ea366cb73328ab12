"""Reading DeepSpeed's shards without DeepSpeed: mapped, tensor by tensor, and without running what they pickle.

ZeRO keeps fp32 master weights in flat partitions: stages 1 and 2 cut each group's concatenation into
equal parts, one a rank; stage 3 gives every rank an equal part of every parameter. A parameter is
therefore a few slices of a few files, and only those pages are read.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsprune.errors import CheckpointError
from dsprune.files import first_line

__all__ = ["MOMENTS", "ShardedTensors", "open_moments", "open_shards"]

logger = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running averages, as optimizers name them."""


class _Inert:
    """Stands in for a class that a shard pickles; holds what it is given and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args


# What shards hold beside tensors and plain values. Anything else is refused by torch's safe unpickler.
_STAND_INS = [
    (_Inert, name)
    for name in (
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    )
]


def _read(path: Path) -> dict[str, Any]:
    """One shard, its tensors mapped from the file."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):  # type: ignore[arg-type]
            shard: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way there is
        raise CheckpointError(
            f"{path} cannot be read: it is damaged or holds what no checkpoint holds ({first_line(error)})"
        ) from error
    return shard


@dataclass
class _Placed:
    """A parameter as slices of flat tensors, in order."""

    shape: tuple[int, ...]
    pieces: list[Tensor] = field(default_factory=list)


class ShardedTensors:
    """The weights of one DeepSpeed checkpoint, fp32, read when asked for."""

    def __init__(self, placed: dict[str, _Placed], source: Path) -> None:
        self._placed = placed
        self.source = source

    def names(self) -> Iterator[str]:
        """Names of all tensors, in the checkpoint's order."""
        return iter(self._placed)

    def __contains__(self, name: str) -> bool:
        return name in self._placed

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self._placed[name].shape

    def same(self, name: str, other: str) -> bool:
        """Whether two names stand for equal values; read only where they lie in different places."""
        ours, theirs = self._placed[name], self._placed[other]
        places = [[(piece.data_ptr(), piece.numel()) for piece in placed.pieces] for placed in (ours, theirs)]
        return places[0] == places[1] or torch.equal(self.read(name), self.read(other))

    def read(self, name: str) -> Tensor:
        """One tensor, fp32 on the CPU: a view of the file where it lies in one piece, else a copy.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._placed:
            raise CheckpointError(f"{self.source} holds no tensor '{name}'")
        placed = self._placed[name]
        pieces = [piece.float() for piece in placed.pieces]
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat[: math.prod(placed.shape)].view(placed.shape)

    def read_flat(self, name: str, start: int, numel: int) -> Tensor:
        """Values [start, start + numel) of a tensor, flattened: [numel] fp32, zeros past the tensor's end.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._placed:
            raise CheckpointError(f"{self.source} holds no tensor '{name}'")
        placed = self._placed[name]
        held = max(0, min(numel, math.prod(placed.shape) - start))
        pieces = [piece.float() for piece in _slices(placed.pieces, start, held)]
        return torch.cat([*pieces, torch.zeros(numel - held)])


def open_shards(folder: Path) -> ShardedTensors:
    """Open the folder that `engine.save_checkpoint` wrote for one tag, or the weights that did not train.

    Raises:
        CheckpointError: files are missing, damaged, or of ranks that do not belong together.
    """
    models = sorted(folder.glob("*model_states.pt"), key=_rank)
    if not models and (still := sorted(folder.glob("*.safetensors"))):
        return ShardedTensors(_from_stream(still), folder)
    if not models:
        raise CheckpointError(f"{folder} holds no model states: it is not a checkpoint of DeepSpeed")
    try:
        placed = _place(folder, models, sorted(folder.glob("*optim_states.pt"), key=_rank))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{folder} does not hold what DeepSpeed saves ({type(error).__name__}: {error})"
        ) from error
    return ShardedTensors(placed, folder)


def open_moments(folder: Path, groups: Sequence[Sequence[str]] = ()) -> tuple[dict[str, ShardedTensors], float]:
    """Adam's moments of the same folder, laid out as the weights are, and the steps that Adam counted.

    Args:
        folder: what `engine.save_checkpoint` wrote for one tag.
        groups: names of the optimizer's parameters, group by group; only stage 0 does not tell them itself.

    Raises:
        CheckpointError: as `open_shards`, or the optimizer is none of Adam's family.
    """
    models = sorted(folder.glob("*model_states.pt"), key=_rank)
    partitions = sorted(folder.glob("*optim_states.pt"), key=_rank)
    try:
        model = _read(models[0])
        shards = [_read(path)["optimizer_state_dict"] for path in partitions]
        _check_ranks(folder, models, model, shards)
        return _place_moments(folder, model, shards, groups)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{folder} does not hold the state of an Adam optimizer ({type(error).__name__}: {error})"
        ) from error


def _place_moments(
    folder: Path, model: dict[str, Any], shards: list[dict[str, Any]], groups: Sequence[Sequence[str]]
) -> tuple[dict[str, ShardedTensors], float]:
    moments: dict[str, ShardedTensors] = {}
    if not shards:
        state = model["optimizer"]["state"]
        names = [name for group in groups for name in group]
        moments = {
            moment: ShardedTensors({name: _whole(state[i][moment]) for i, name in enumerate(names)}, folder)
            for moment in MOMENTS
        }
        return moments, float(state[0]["step"])
    sharded = _is_stage3(shards)
    states = [
        _by_group(shard["optimizer_state_dict"]["state"] if sharded else shard["base_optimizer_state"]["state"])
        for shard in shards
    ]
    for moment in MOMENTS:
        parts = [[group[moment].flatten() for group in groups_of_rank] for groups_of_rank in states]
        placed = _stage3_layout(model, parts) if sharded else _stage12_layout(model, shards, parts)
        moments[moment] = ShardedTensors(placed, folder)
    return moments, float(states[0][0]["step"])


def _by_group(state: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [state[group] for group in sorted(state)]


def _place(folder: Path, models: list[Path], partitions: list[Path]) -> dict[str, _Placed]:
    model = _read(models[0])
    shards = [_read(path)["optimizer_state_dict"] for path in partitions]
    _check_ranks(folder, models, model, shards)
    if not shards:
        return _from_module(model)
    sharded = _is_stage3(shards)
    if sharded:
        placed = _from_stage3(model, shards) | _frozen([model, *(_read(path) for path in models[1:])])
        placed |= {name: _whole(model["module"][name]) for name in model["buffer_names"]}
    else:
        placed = _from_stage12(model, shards)
    for alias, original in dict(model.get("shared_params") or {}).items():
        if original in placed:
            placed[alias] = placed[original]
    if not sharded:
        # What no optimizer holds, frozen weights and buffers, stands whole beside it.
        placed |= {name: _whole(tensor) for name, tensor in model["module"].items() if name not in placed}
    return placed


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)", path.name)
    return int(match[1]) if match else 0


def _is_stage3(shards: list[dict[str, Any]]) -> bool:
    return "fp32_flat_groups" in shards[0]


def _check_ranks(folder: Path, models: list[Path], model: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    if not shards:
        if model.get("param_shapes"):
            raise CheckpointError(f"{folder} holds no optimizer shards, and the weights are in those")
        return
    count = shards[0]["partition_count"]
    expected = max(count) if isinstance(count, list) else int(count)
    if expected != len(shards):
        raise CheckpointError(f"{folder} was written by {expected} ranks and holds the shards of {len(shards)}")
    states = expected if _is_stage3(shards) else 1
    if states != len(models):
        raise CheckpointError(f"{folder} should hold {states} files of model states and holds {len(models)}")


def _from_module(model: dict[str, Any]) -> dict[str, _Placed]:
    """Stage 0: whole tensors."""
    if any(t.dtype in (torch.float16, torch.bfloat16) for t in model["module"].values()):
        logger.warning("the checkpoint holds half-precision weights without fp32 masters: exporting those")
    return {name: _whole(tensor) for name, tensor in model["module"].items()}


def _from_stream(files: list[Path]) -> dict[str, _Placed]:
    """Whole tensors of safetensors files, mapped.

    Raises:
        CheckpointError: a file is damaged.
    """
    placed: dict[str, _Placed] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                placed |= {name: _whole(file.get_tensor(name)) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return placed


def _whole(tensor: Tensor) -> _Placed:
    return _Placed(tuple(tensor.shape), [tensor.flatten()])


def _from_stage12(model: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, _Placed]:
    """Stages 1 and 2: each group is one flat vector, cut into equal parts over ranks."""
    return _stage12_layout(model, shards, [shard["single_partition_of_fp32_groups"] for shard in shards])


def _stage12_layout(
    model: dict[str, Any], shards: list[dict[str, Any]], values: list[list[Tensor]]
) -> dict[str, _Placed]:
    """Where parameters lie in flat values, given by rank and group, that are cut as fp32 masters are."""
    placed: dict[str, _Placed] = {}
    paddings = shards[0].get("param_alignment_paddings")
    for group, shapes in enumerate(model["param_shapes"]):
        parts = [of_rank[group] for of_rank in values]
        offset = 0
        for i, (name, shape) in enumerate(shapes.items()):
            numel = math.prod(shape)
            placed[name] = _Placed(tuple(shape), _slices(parts, offset, numel))
            offset += numel + (int(paddings[group][i]) if paddings is not None else 0)
        # The end is padded so that two equal, aligned parts go to every rank.
        _check_end(offset, sum(part.numel() for part in parts), slack=2 * len(shards))
    return placed


def _from_stage3(model: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, _Placed]:
    """Stage 3: every rank holds ceil(numel / ranks) of every parameter, one after the other."""
    return _stage3_layout(model, [shard["fp32_flat_groups"] for shard in shards])


def _stage3_layout(model: dict[str, Any], values: list[list[Tensor]]) -> dict[str, _Placed]:
    """Where parameters lie in flat values, given by rank and group, that are cut as fp32 masters are."""
    placed: dict[str, _Placed] = {}
    world_size, offset = len(values), 0
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            numel = math.ceil(math.prod(shape) / world_size)
            pieces = [piece for of_rank in values for piece in _slices(of_rank, offset, numel)]
            placed[name] = _Placed(tuple(shape), pieces)
            offset += numel
    for of_rank in values:
        _check_end(offset, sum(part.numel() for part in of_rank), slack=1)
    return placed


def _check_end(read: int, held: int, *, slack: int) -> None:
    """See that parameters and shard end together: what lies in an unknown layout would be read as wrong weights."""
    if not 0 <= held - read < slack:
        raise CheckpointError(f"a shard holds {held} values where its parameters have {read}: its layout is not known")


def _slices(parts: list[Tensor], offset: int, numel: int) -> list[Tensor]:
    """The pieces of `[offset, offset + numel)` in the concatenation of `parts`."""
    pieces = []
    for part in parts:
        if numel and offset < part.numel():
            piece = part[offset : offset + numel]
            pieces.append(piece)
            numel -= piece.numel()
            offset += piece.numel()
        offset -= part.numel()
    if numel:
        raise CheckpointError("a shard is shorter than the parameters that it should hold")
    return pieces


def _frozen(models: list[dict[str, Any]]) -> dict[str, _Placed]:
    """Stage 3: frozen parameters are cut like the others, and lie in the model states of every rank."""
    shapes = models[0].get("frozen_param_shapes") or {}
    return {
        name: _Placed(tuple(shape), [state["frozen_param_fragments"][name].flatten() for state in models])
        for name, shape in shapes.items()
    }
