"""The fifth stage, MLPruning's second step: blocks of whatever compact model there is, which also teaches."""

from __future__ import annotations

from dsprune.config import BlocksConfig
from dsprune.distill import default_teacher_layers
from dsprune.engine.learning.student import Student
from dsprune.engine.zero.config import DsConfig
from dsprune.methods import Plan
from dsprune.methods.mlpruning_blocks import BlockPruning
from dsprune.run.stages.base import Assembly, TrainingStage, begin
from dsprune.run.stages.distilling import load_teacher, match_copy
from dsprune.run.training.snapshots import Origin
from dsprune.structure import BlockGating, BlockStructure, analyze_blocks, block_budget
from dsprune.structure.layout import layer_paths

__all__ = ["BlocksStage"]


class BlocksStage(TrainingStage):
    """Learns which blocks of the compact model's matrices to lose."""

    name = "blocks"

    @property
    def section(self) -> BlocksConfig:
        return self.context.config.blocks

    def nothing_to_do(self) -> str | None:
        return "0 steps, skipped" if self.total_steps == 0 else None

    def assemble(self, ds_config: DsConfig) -> Assembly:
        context, source = self.context, self.context.recovered_source
        model = context.models.student(str(source), ds_config)
        structure = analyze_blocks(model, self.section.shape)
        method = BlockPruning(structure, self.section, self._plan(structure))
        begin(method, model, context.world)
        num_layers = len(layer_paths(model))
        layers = self._teacher_layers(num_layers)
        teacher = load_teacher(context, str(source), layers)
        student = Student(
            model,
            context.task,
            distill=context.config.distill,
            teacher=(teacher.width, layers),
            gating=BlockGating(model, structure),
        )
        matcher = match_copy(context, teacher, layers, num_layers)
        return Assembly(student, Origin(compact=source), method, teacher, matcher)

    def _plan(self, structure: BlockStructure) -> Plan:
        per_epoch = self.context.batches.steps_per_epoch
        budget = block_budget(structure, self.section.target)
        return Plan(budget, self.total_steps, per_epoch, self.context.config.seed)

    def _teacher_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of the compact teacher: those that learned in its place, as far as it has them."""
        distill = self.context.config.distill
        asked: tuple[int, ...] = default_teacher_layers(num_layers)
        if distill.teacher_layers is not None or distill.layer_pairs is not None:
            asked = tuple(sorted(set(self.context.findings.teaching.partners)))
        elif distill.teacher_draw != "all":
            asked = tuple(range(1, num_layers + 1))
        return tuple(layer for layer in asked if layer <= num_layers)
