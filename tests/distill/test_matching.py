from itertools import pairwise

import pytest
import torch

from dsprune.distill import (
    UNMATCHED,
    check_teacher_layers,
    default_teacher_layers,
    match_fixed,
    match_free,
    match_layers,
    match_monotone,
)
from dsprune.errors import ConfigError

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
    arguments = {"teacher_layers": (1, 2), "live": [True, True], "sources": (0, 1)}
    for rule in ("fixed", "free", "monotone"):
        assert match_layers(rule, **arguments, distances=None) == [0, 1]


@pytest.mark.parametrize("layers", [(), (-1, 3), (3, 7), (4, 2), (2, 2)])
def test_impossible_teacher_layers_are_refused(layers):
    with pytest.raises(ConfigError, match="from 1 to 6"):
        check_teacher_layers(layers, 6)
