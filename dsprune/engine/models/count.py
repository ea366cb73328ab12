"""What a model counts: its own parameters, from its own configuration, no weights read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dsprune.config import RunConfig
from dsprune.consolidate import without_weights
from dsprune.engine.models.skeleton import compact_facts, skeleton
from dsprune.files import read_json
from dsprune.pretrained import resolve_source
from dsprune.structure import CostModel, analyze
from dsprune.tasks import Task

__all__ = ["ModelCount", "count_base", "count_model", "count_teacher"]


@dataclass(frozen=True)
class ModelCount:
    """One model with the task's head.

    Attributes:
        source: as it was given.
        encoder: parameters inside the layers.
        total: all parameters.
        shapes: of each parameter, by name.
    """

    source: str
    encoder: int
    total: int
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> dict[str, int]:
        """Both counts by name."""
        return {"encoder": self.encoder, "total": self.total}


def count_model(source: str, task: Task, revision: str | None = None) -> ModelCount:
    """A dense or compact model.

    Raises:
        ConfigError: the source cannot be read.
        ArchitectureError: a family that dsprune does not know.
    """
    folder = resolve_source(source)
    if compact_facts(folder) is not None:
        config = read_json(Path(folder) / "config.json")
        counted = config["dsprune"]["parameters"]
        return ModelCount(source, counted["encoder"], counted["total"], _shapes(without_weights(config)))
    model = skeleton(source, task, revision)
    cost = CostModel(analyze(model))
    return ModelCount(source, cost.dense("encoder"), cost.dense("total"), _shapes(model))


def count_base(config: RunConfig, task: Task) -> ModelCount:
    """The model that is pruned, as it was."""
    return count_model(config.model.name, task, config.model.revision)


def count_teacher(config: RunConfig, task: Task) -> ModelCount:
    """The model that teaches: the one that is given, or the fine-tuned base."""
    return count_base(config, task) if config.teacher.path is None else count_model(config.teacher.path, task)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in model.named_parameters()}
