"""How a teacher fits a student: depths, widths and heads of the two, read before either is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from dsprune.config import RunConfig
from dsprune.distill import LayerPlan, plan_layers
from dsprune.engine.models.skeleton import skeleton
from dsprune.errors import ConfigError
from dsprune.structure import Structure
from dsprune.structure.layout import layer_stacks
from dsprune.tasks import Task

__all__ = ["TeacherShape", "plan_teaching", "student_stacks", "teacher_shape"]


@dataclass(frozen=True)
class TeacherShape:
    """What layerwise distillation needs to know of a teacher.

    Attributes:
        stacks: for each layer, the stack that it stands in: 0, or 1 for a decoder beside an encoder.
        width: of its hidden states.
        heads: attention heads of every layer; None where layers have unequal numbers.
    """

    stacks: tuple[int, ...]
    width: int
    heads: int | None


def student_stacks(structure: Structure) -> tuple[int, ...]:
    """For each layer of the dense student, the stack that it stands in."""
    return tuple(i for i, stack in enumerate(structure.stacks) for _ in stack.layers)


def teacher_shape(config: RunConfig, task: Task, structure: Structure) -> TeacherShape:
    """Shape of the given teacher, or of the dense student where that is fine-tuned into one.

    Raises:
        ArchitectureError: a family that dsprune does not know, or that does not fit the task.
    """
    if config.teacher.path is None:
        return TeacherShape(student_stacks(structure), structure.sizes.hidden, structure.sizes.num_heads)
    teacher = skeleton(config.teacher.path, task, what="teacher")
    theirs = teacher.config
    heads = None if getattr(theirs, "dsprune", None) else int(theirs.num_attention_heads)
    return TeacherShape(layer_stacks(teacher), int(theirs.hidden_size), heads)


def plan_teaching(
    config: RunConfig, structure: Structure, teacher: TeacherShape, gates: tuple[str, ...] = ()
) -> LayerPlan:
    """Which layers of the teacher teach which of the student.

    Args:
        config: of the run.
        structure: of the dense student.
        teacher: its shape.
        gates: kinds of units that pruning removes.

    Raises:
        ConfigError: layers, widths or heads that do not fit; all mistakes together.
        ArchitectureError: an encoder-decoder and a model of one stack.
    """
    distill = config.distill
    asked = distill.teacher_layers is not None or distill.layer_pairs is not None
    if distill.layers == 0 and distill.attentions == 0 and not asked:
        return LayerPlan((), ())
    mistakes: list[str] = []
    try:
        plan = plan_layers(distill, student_stacks(structure), teacher.stacks)
    except ConfigError as error:
        mistakes.extend(error.mistakes)
    if distill.layers > 0 and distill.projection == "none":
        mistakes.extend(_width_mistakes(config, structure, teacher, gates))
    if distill.attentions > 0 and teacher.heads != structure.sizes.num_heads:
        theirs = "unequal numbers of heads" if teacher.heads is None else f"{teacher.heads} heads"
        mistakes.append(
            f"distill.attentions = {distill.attentions:g}: the teacher's layers have {theirs} and the student's "
            f"{structure.sizes.num_heads}: maps are compared head by head; set it to 0, "
            "distill.layers compares hidden states"
        )
    if mistakes:
        raise ConfigError(*mistakes)
    return plan


def _width_mistakes(
    config: RunConfig, structure: Structure, teacher: TeacherShape, gates: tuple[str, ...]
) -> list[str]:
    """Hidden states that are to be compared without a projection, and are not equally wide."""
    way_out = 'learn a projection with distill.projection = "shared"'
    if teacher.width != structure.sizes.hidden:
        return [
            f"distill.projection = 'none': the teacher is {teacher.width} wide and the student "
            f"{structure.sizes.hidden}: {way_out}"
        ]
    if "hidden" in gates and "recover" in config.stages and config.recover.duration.count > 0:
        return [
            "distill.projection = 'none': pruning removes hidden dimensions, and the compact model that recovers is "
            f"then narrower than its teacher: {way_out}"
        ]
    return []
