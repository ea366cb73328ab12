"""Landing on a speedup as measured, with a clock made by hand: what it comes to, in how many tries, what is said."""

import pytest

from dsprune.run.training.timed_landing import CLOSE, CORRECTIONS, land_on_speedup
from tests.helpers.models import tiny_model
from tests.helpers.training import pruning
from tests.methods.test_targets import METHODS, _fine_model, _moved

COFI = next(variant for variant in METHODS if variant.method == "cofi")


@pytest.fixture(scope="module")
def method():
    return _moved(COFI, _fine_model(), 0.5, "time", 0)


def _predicted(method, selection):
    return 1 / (1 - method.budget.removed(selection.gates))


@pytest.mark.parametrize("power", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_a_table_that_is_off_is_corrected(method, factor, power):
    """The first choice would be a tenth off and more; the measured speedup of the last one is what was asked for."""
    measured = lambda selection: factor * _predicted(method, selection) ** power  # noqa: E731
    selection, landing = land_on_speedup(method.budget, method.select_at, measured)
    assert abs(landing.measured / 2 - 1) <= CLOSE
    assert landing.measured == measured(selection)
    assert landing.predicted == _predicted(method, selection)
    assert not landing.missed
    assert 1 < len(landing.tried) <= 1 + CORRECTIONS
    assert "asked for 2x" in landing.describe()


def test_a_table_that_is_right_is_believed(method):
    _, landing = land_on_speedup(method.budget, method.select_at, lambda selection: _predicted(method, selection))
    assert len(landing.tried) == 1
    assert landing.predicted == landing.measured


def test_of_choices_that_do_not_come_near_the_nearest_is_taken_and_said(method):
    """Ever slower than predicted, whatever goes: the run says how far, and why."""
    asked = iter([1.2, 1.5, 1.3, 1.4])
    selection, landing = land_on_speedup(method.budget, method.select_at, lambda _: next(asked))
    assert landing.measured == 1.5
    assert landing.missed
    assert "25% too slow" in landing.describe()
    assert "3 corrections did not come nearer" in landing.describe()
    assert landing.predicted == _predicted(method, selection)


def test_units_too_coarse_for_a_speedup_are_said():
    """Of a model of two units the next choice is the same one."""
    method, _ = pruning("mlpruning", {"lr": 0.3, "gates": ["head"]}, 0.02, tiny_model("bert"), of="time")
    _, landing = land_on_speedup(method.budget, method.select_at, lambda _: 1.2)
    assert landing.coarse
    assert "the units of this model are coarser than that" in landing.describe()
