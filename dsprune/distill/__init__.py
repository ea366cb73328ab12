"""Losses between teacher and student, and the matching of their layers."""

from dsprune.distill.attention import AttentionTap, attention_loss
from dsprune.distill.head import Question, VocabularyHead
from dsprune.distill.hidden import HiddenTap
from dsprune.distill.losses import layer_distances, layer_loss
from dsprune.distill.matching import (
    UNMATCHED,
    LayerPlan,
    check_teacher_layers,
    default_teacher_layers,
    draw_layers,
    match_fixed,
    match_free,
    match_layers,
    match_monotone,
    plan_layers,
)
from dsprune.distill.vocabulary import TeacherLogits, TeacherStates, TopLogits, chunked_losses, surprisals, top_logits

__all__ = [
    "UNMATCHED",
    "AttentionTap",
    "HiddenTap",
    "LayerPlan",
    "Question",
    "TeacherLogits",
    "TeacherStates",
    "TopLogits",
    "VocabularyHead",
    "attention_loss",
    "check_teacher_layers",
    "chunked_losses",
    "default_teacher_layers",
    "draw_layers",
    "layer_distances",
    "layer_loss",
    "match_fixed",
    "match_free",
    "match_layers",
    "match_monotone",
    "plan_layers",
    "surprisals",
    "top_logits",
]
