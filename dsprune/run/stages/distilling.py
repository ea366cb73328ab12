"""Who teaches the student of a stage, and which of its layers learn from which."""

from __future__ import annotations

from collections.abc import Sequence

from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.learning.trainer import LayerMatcher
from dsprune.run.context import RunContext
from dsprune.run.preflight.teaching import student_stacks

__all__ = ["load_dense_teacher", "load_teacher", "match_copy", "match_planned"]


def load_teacher(context: RunContext, source: str, layers: Sequence[int]) -> Teacher:
    """A teacher whose layers are held as far as the recipe compares any. Collective: all ranks must call.

    Args:
        context: of the run.
        source: folder or hub id.
        layers: that may teach, counted from 1; 0 stands for the embeddings.
    """
    distill = context.config.distill
    wanted = distill.layers > 0 or distill.attentions > 0
    return context.models.teacher(source, layers if wanted else (), attentions=distill.attentions > 0)


def load_dense_teacher(context: RunContext) -> Teacher:
    """The fine-tuned dense model, with the layers that preflight planned. Collective: all ranks must call.

    Raises:
        ConfigError: there is none yet.
    """
    return load_teacher(context, context.teacher_source, context.findings.teaching.layers)


def match_planned(context: RunContext, teacher: Teacher, sources: Sequence[int]) -> LayerMatcher | None:
    """The match of student layers with those of the dense teacher, as preflight planned it; None without layers.

    Args:
        context: of the run.
        teacher: its engine.
        sources: for each student layer, the dense layer that it was (from 0).
    """
    if not teacher.has_taps:
        return None
    distill, plan = context.config.distill, context.findings.teaching
    return LayerMatcher(
        distill.match,
        plan.layers,
        sources,
        teacher.layer_stacks,
        partners=plan.partners,
        student_stacks=student_stacks(context.findings.structure),
        draw=distill.teacher_draw,
        seed=context.config.seed,
    )


def match_copy(context: RunContext, teacher: Teacher, layers: Sequence[int], num_layers: int) -> LayerMatcher | None:
    """The match of a student with a teacher that it is a copy of; None without layers.

    Args:
        context: of the run.
        teacher: its engine.
        layers: of it that may teach, counted from 1; 0 stands for the embeddings.
        num_layers: of either.
    """
    if not teacher.has_taps:
        return None
    distill = context.config.distill
    return LayerMatcher(
        distill.match,
        layers,
        tuple(range(num_layers)),
        teacher.layer_stacks,
        draw=distill.teacher_draw,
        seed=context.config.seed,
    )
