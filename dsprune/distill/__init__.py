"""Losses between teacher and student, and the matching of their layers."""

from dsprune.distill.attention import AttentionTap, attention_loss
from dsprune.distill.hidden import HiddenTap
from dsprune.distill.losses import layer_distances, layer_loss, logit_loss
from dsprune.distill.matching import (
    UNMATCHED,
    check_teacher_layers,
    default_teacher_layers,
    match_fixed,
    match_free,
    match_layers,
    match_monotone,
)

__all__ = [
    "UNMATCHED",
    "AttentionTap",
    "HiddenTap",
    "attention_loss",
    "check_teacher_layers",
    "default_teacher_layers",
    "layer_distances",
    "layer_loss",
    "logit_loss",
    "match_fixed",
    "match_free",
    "match_layers",
    "match_monotone",
]
