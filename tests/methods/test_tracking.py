"""Whether a learned sparsity follows its target is said, and what landing did where it did not."""

import pytest
import torch

from dsprune.methods import method_class
from dsprune.methods.tracking import Landing, has_reached, landing_of, report_lag
from dsprune.structure import analyze
from tests.helpers.models import tiny_model
from tests.helpers.plans import plan_for
from tests.helpers.training import block_pruning, without_some_units


def _method(name, target=0.9, **options):
    cls = method_class(name)
    structure = analyze(tiny_model("bert"))
    return cls(structure, cls.Options(**options), plan_for(structure, name, target, total=100, per_epoch=10))


def _cofi(**options):
    return _method("cofi", **{"distill_phase": "10 steps", "warmup": "20 steps", **options})


def _open(method, log_alpha):
    with torch.no_grad():
        for alpha in method.log_alpha.values():
            alpha.fill_(log_alpha)


def test_a_method_that_trails_its_target_says_so_once_when_that_has_warmed_up():
    method = _cofi()
    line = report_lag(method, 30)
    expected = float(method.expected_sparsity().detach())
    assert f"warmed up to 90.0% and the expected sparsity is {expected:.1%}" in line
    assert f"{100 * (0.9 - expected):.1f} points behind" in line
    assert "raise method.lr" in line
    assert [step for step in range(100) if report_lag(method, step)] == [30]
    _open(method, -4.0)
    assert report_lag(method, 30) is None
    assert all(report_lag(_method(name, 0.5), step) is None for name in ("grain", "mlpruning") for step in range(99))


def test_what_landing_cuts_away_is_counted_by_kind():
    method = _cofi()
    assert landing_of(method, 5, method.select().gates) is None, "gates are not on yet"
    choice = method.select().gates
    landing = landing_of(method, 100, choice)
    assert landing.before == 0
    assert landing.after == pytest.approx(method.budget.removed(choice))
    assert landing.after >= 0.9
    assert landing.gap == pytest.approx(0.9 - float(method.expected_sparsity().detach()))
    for kind in ("head", "ffn_dim", "hidden"):
        assert landing.cut[kind] == int((choice[kind] == 0).sum()), kind
    assert not any(landing.given_back.values())
    assert landing.missed(0.01)
    words = landing.describe()
    assert "points short of the target of 90.0%" in words
    assert f"from 0.0% to {landing.after:.1%}" in words
    assert f"{landing.cut['ffn_dim']:,} neurons" in words


def test_units_of_a_sublayer_that_was_off_are_not_counted_as_cut():
    method = _cofi(target=0.95)
    with torch.no_grad():
        method.log_alpha["ffn"][0] = -4.0
    landing = landing_of(method, 100, method.select().gates)
    assert landing.cut["ffn_dim"] <= 64


def test_landing_gives_back_what_was_learned_too_much_of():
    method = _cofi(target=0.3)
    _open(method, -4.0)
    landing = landing_of(method, 100, method.select().gates)
    assert landing.before > landing.after >= 0.3
    assert landing.given_back["ffn_dim"] > 0
    assert landing.gap < 0
    assert landing.missed(0.01)
    assert "beyond the target of 30.0%" in landing.describe()
    assert not Landing(0.5, 0.52, before=0.52, after=0.5).missed(0.01)
    assert Landing(0.5, 0.56, before=0.56, after=0.5).missed(0.01)
    assert Landing(0.5, 0.48, before=0.48, after=0.5).missed(0.01)


def test_a_sparsity_that_is_set_is_only_missed_when_it_falls_short():
    method = _method("grain", 0.5)
    assert landing_of(method, 5, method.mask) is None
    method.mask = method._pruned(0.5)
    landing = landing_of(method, 100, method.select().gates)
    assert landing.expected is None
    assert not landing.missed(0.0)
    assert not any(landing.cut.values())
    assert Landing(0.5, None, before=0.4, after=0.5).missed(0.01)


def test_blocks_are_counted_as_blocks():
    method, _ = block_pruning({}, 0.5, without_some_units(tiny_model("bert")), total=100)
    selection = method.select()
    landing = landing_of(method, 100, selection.gates)
    assert landing.cut == {"block": sum(int((mask == 0).sum()) for mask in selection.masks.values())}
    assert landing.after >= 0.5
    assert f"{landing.cut['block']:,} blocks" in landing.describe()


def test_the_target_is_reached_but_for_epsilon():
    """CoFi's code: expected sparsity - target >= -epsilon."""
    method = _cofi(target=0.6)
    assert not has_reached(method, 5, 1.0), "gates are not on yet"
    expected = float(method.expected_sparsity().detach())
    assert not has_reached(method, 50, 0.6 - expected - 1e-6)
    assert has_reached(method, 50, 0.6 - expected + 1e-6)
    grain = _method("grain", 0.5)
    assert not has_reached(grain, 50, 0.01)
    grain.mask = grain._pruned(0.5)
    assert has_reached(grain, 50, 0.0)
