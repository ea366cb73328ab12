"""The first stage: the dense model, fine-tuned on the task, where no teacher is given."""

from __future__ import annotations

from dsprune.config import TeacherConfig
from dsprune.engine.learning.student import Student
from dsprune.engine.zero.config import DsConfig
from dsprune.run.stages.base import Assembly, TrainingStage
from dsprune.run.training.snapshots import Origin

__all__ = ["TeacherStage"]


class TeacherStage(TrainingStage):
    """Fine-tunes the dense model."""

    name = "teacher"

    @property
    def section(self) -> TeacherConfig:
        return self.context.config.teacher

    def nothing_to_do(self) -> str | None:
        return f"given, {self.section.path}" if self.section.path is not None else None

    def assemble(self, ds_config: DsConfig) -> Assembly:
        self.context.seed("head")
        model = self.context.models.student(None, ds_config)
        return Assembly(Student(model, self.context.task), Origin())
