"""The fourth stage: the compact model trains on, the dense teacher still distilling."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from dsprune.config import RecoverConfig
from dsprune.consolidate import kept_heads, open_checkpoint
from dsprune.engine.learning.student import Student
from dsprune.engine.zero.config import DsConfig
from dsprune.run.context import RunContext
from dsprune.run.stages.base import Assembly, TrainingStage
from dsprune.run.stages.distilling import load_dense_teacher, match_planned
from dsprune.run.training.snapshots import Origin
from dsprune.run_folder import SELECTION
from dsprune.structure import Selection

__all__ = ["RecoverStage"]


class RecoverStage(TrainingStage):
    """Trains the weights of the compact model."""

    name = "recover"

    @property
    def section(self) -> RecoverConfig:
        return self.context.config.recover

    def nothing_to_do(self) -> str | None:
        return "0 steps, skipped" if self.total_steps == 0 else None

    def assemble(self, ds_config: DsConfig) -> Assembly:
        context, source = self.context, self.context.compact_source
        teacher = load_dense_teacher(context)
        model = context.models.student(str(source), ds_config)
        facts = getattr(model.config, "dsprune", None)
        student = Student(
            model,
            context.task,
            distill=context.config.distill,
            teacher=(teacher.width, context.findings.teaching.layers),
            projections=_pruned_projections(context),
            head_sources=kept_heads(facts) if facts else None,
        )
        matcher = match_planned(context, teacher, _dense_layers(context, source))
        return Assembly(student, Origin(compact=source), teacher=teacher, matcher=matcher)


def _dense_layers(context: RunContext, folder: Path) -> tuple[int, ...]:
    """For each layer of a compact model, the dense layer that it was (from 0)."""
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dsprune")
    if facts is None:
        return tuple(range(context.findings.structure.sizes.num_layers))
    return tuple(layer["source"] for layer in facts["layers"])


def _pruned_projections(context: RunContext) -> list[tuple[Tensor, Tensor]]:
    """The projections that pruning trained, cut to the hidden dimensions that are left; none where it trained none.

    Returns:
        Weight [teacher width, hidden] and bias [teacher width] of each.
    """
    folder = context.folder
    if context.config.distill.layers == 0 or not folder.facts("prune") or not folder.committed("prune"):
        return []
    checkpoint = folder.chosen_checkpoint("prune")
    if not (checkpoint / SELECTION).exists():
        return []
    source = open_checkpoint(checkpoint)
    kept = Selection.load(checkpoint / SELECTION).kept(context.findings.structure.hidden)
    count = sum(name.startswith("projections.") and name.endswith(".weight") for name in source.names())
    return [
        (source.read(f"projections.{i}.weight")[:, kept], source.read(f"projections.{i}.bias")) for i in range(count)
    ]
