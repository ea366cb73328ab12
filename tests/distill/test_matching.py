import random
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from dsprune.config import DistillConfig
from dsprune.distill import (
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
from dsprune.errors import ArchitectureError, ConfigError

DISTANCES = torch.tensor(
    [
        [0.1, 0.2, 0.9, 0.9, 0.9, 0.9],
        [0.9, 0.1, 0.2, 0.9, 0.9, 0.9],
        [0.9, 0.9, 0.9, 0.5, 0.1, 0.2],
    ]
)


def test_default_layers_are_those_of_the_paper():
    assert default_teacher_layers(12) == (3, 6, 9, 12)
    assert default_teacher_layers(6) == (2, 3, 4, 6)
    assert default_teacher_layers(2) == (1, 2)


def test_fixed_leaves_the_partners_of_removed_layers_unmatched():
    live = [True, True, False, True, True, True]
    assert match_fixed((2, 3, 6), live, range(6)) == [1, UNMATCHED, 5]


def test_fixed_follows_layers_that_moved_up_when_others_were_removed():
    assert match_fixed((2, 4, 6), [True] * 3, (0, 3, 5)) == [UNMATCHED, 1, 2]


def test_free_takes_the_nearest_live_layer():
    assert match_free(DISTANCES, [True] * 6) == [0, 1, 4]
    assert match_free(DISTANCES, [False, True, True, True, False, True]) == [1, 1, 5]
    assert match_free(DISTANCES, [False] * 6) == [UNMATCHED] * 3


def test_monotone_never_crosses_and_reads_liveness_by_layer():
    """Pitfall 2 of the authors' code: liveness indexed by position in a sorted list."""
    assert match_monotone(DISTANCES, [True] * 6) == [0, 1, 4]
    assert match_monotone(DISTANCES, [True, True, True, True, False, True]) == [0, 1, 5]
    crossed = DISTANCES.flip(0)
    match = match_monotone(crossed, [True] * 6)
    assert all(a < b for a, b in pairwise(match) if a != UNMATCHED)


def test_monotone_runs_out_of_layers_without_running_out_of_range():
    """Pitfall 2: the fallback index 12 does not exist."""
    assert match_monotone(DISTANCES, [True, False, False, False, False, False]) == [UNMATCHED, UNMATCHED, 0]
    assert match_monotone(DISTANCES, [False] * 6) == [UNMATCHED] * 3


def test_dynamic_rules_begin_with_the_fixed_match():
    arguments = {"partners": (1, 2), "live": [True, True], "sources": (0, 1)}
    for rule in ("fixed", "free", "monotone"):
        assert match_layers(rule, **arguments, distances=None) == [0, 1]


@pytest.mark.parametrize("layers", [(), (-1, 3), (3, 7), (4, 2), (2, 2)])
def test_impossible_teacher_layers_are_refused(layers):
    with pytest.raises(ConfigError, match="from 1 to 6"):
        check_teacher_layers(layers, 6)


def _plan(student, teacher, **distill):
    return plan_layers(DistillConfig(**distill), [0] * student, [0] * teacher)


def test_the_layers_that_teach_are_the_teachers():
    assert _plan(6, 12) == LayerPlan((3, 6, 9, 12), (2, 3, 5, 6))
    assert _plan(6, 12, teacher_layers=(2, 4, 12)) == LayerPlan((2, 4, 12), (1, 2, 6))
    assert _plan(6, 2) == LayerPlan((1, 2), (3, 6))
    assert _plan(12, 6) == LayerPlan((2, 3, 4, 6), (4, 6, 8, 12))
    assert _plan(6, 6, teacher_layers=(0, 1, 6)) == LayerPlan((0, 1, 6), (0, 1, 6))


@pytest.mark.parametrize(("student", "teacher"), [(4, 12), (3, 12), (6, 12), (12, 12), (1, 4)])
def test_a_teacher_that_is_so_many_times_as_deep_is_paired_as_in_mlprunings_code(student, teacher):
    """Its loop: layer i of the student, from 0, learns from layer i * k + k - 1 of a teacher k times as deep."""
    k = teacher // student
    literal = [(i + 1, i * k + k - 1 + 1) for i in range(student)]
    plan = _plan(student, teacher, match="fixed", teacher_layers=tuple(layer for _, layer in literal))
    assert list(zip(plan.partners, plan.layers, strict=True)) == literal


def test_a_fixed_match_gives_no_student_layer_two_teachers_of_its_own_accord():
    assert _plan(2, 12, match="fixed") == LayerPlan((6, 12), (1, 2))
    assert _plan(2, 12, match="free") == LayerPlan((3, 6, 9, 12), (1, 1, 2, 2))
    with pytest.raises(ConfigError, match=r"layers 1 and 2 of the teacher both stand beside layer 1"):
        _plan(3, 6, match="fixed", teacher_layers=(1, 2, 6))


def test_layers_of_a_decoder_stand_beside_layers_of_a_decoder():
    plan = plan_layers(DistillConfig(teacher_layers=(2, 4, 5, 6)), [0, 0, 1, 1], [0, 0, 0, 0, 1, 1])
    assert plan.partners == (1, 2, 3, 4)
    with pytest.raises(ArchitectureError, match=r"1 stack\(s\) of layers and the model 2"):
        plan_layers(DistillConfig(), [0, 0, 1, 1], [0, 0])


def test_pairs_are_taken_as_they_are_said():
    pairs = ((6, 11), (0, 0), (2, 3), (1, 3))
    assert _plan(6, 12, match="fixed", layer_pairs=pairs) == LayerPlan((0, 3, 3, 11), (0, 1, 2, 6))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((), "at least one pair"),
        (((1, 1), (1, 1)), "each once"),
        (((7, 1),), "the student has 6 and the teacher 12"),
        (((1, 13),), "the student has 6 and the teacher 12"),
        (((0, 3),), "the embeddings, 0, pair with the embeddings alone"),
    ],
)
def test_impossible_pairs_are_refused(pairs, message):
    with pytest.raises(ConfigError, match=message):
        _plan(6, 12, match="fixed", layer_pairs=pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_pairs": [[1, 1]], "teacher_layers": [1], "match": "fixed"}, "leave out teacher_layers"),
        ({"layer_pairs": [[1, 1]]}, 'set match = "fixed"'),
        ({"layer_pairs": [[1, 1]], "match": "fixed", "teacher_draw": "random"}, "and no draw"),
        ({"teacher_layers": [0, 1], "teacher_draw": "random"}, "names 0, the embeddings"),
    ],
)
def test_settings_of_layers_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DistillConfig(**settings)


def _literal_version(version, generator):
    """CoFi's code (`calculate_layer_distillation_loss`), versions 5 and 6: layers of twelve, counted from 0."""
    specified = list(range(12))
    if version == 5:
        specified = sorted(generator.sample(specified, 4))
    else:
        result, window = [], len(specified) // 4
        for i in range(0, len(specified), window):
            result.append(generator.sample(specified[i : i + window], 1)[0])
        specified = result
    specified[0] = max(2, specified[0])
    return specified


@pytest.mark.parametrize(("rule", "version"), [("random", 5), ("quarters", 6)])
def test_teacher_layers_are_drawn_as_in_cofis_code(rule, version):
    seen = set()
    for seed in range(200):
        drawn = draw_layers(rule, 12, seed)
        assert set(drawn) == set(_literal_version(version, random.Random(seed)))
        assert drawn == sorted(drawn)
        seen |= set(drawn)
    assert seen == set(range(1 if version == 5 else 2, 12))
    assert draw_layers("all", 5, 0) == [0, 1, 2, 3, 4]
    assert all(len(draw_layers(rule, count, 1)) >= 1 for count in (1, 2, 3, 5, 7))
