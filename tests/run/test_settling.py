"""A stage that learns gates says whether they came to their target, and exports the checkpoint that it was asked to."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from tests.helpers.runs import execute, ground, history, words
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


SCORES = [0.9, 0.95, 0.2, 0.7, 0.6, 0.5]
"""Accuracies, step by step, of a run whose gates come on after the third."""


def _said(scores, *launches):
    """Exit code and what rank 0 said, of one launch after the other; the last two are scored as they are told to."""
    import dsprune.run.training.scoring as scoring

    results, evaluate = [], scoring.evaluate_all
    for i, launch in enumerate(launches):
        told = iter(scores)
        scoring.evaluate_all = (lambda *_, told=told, **__: {"accuracy": next(told)}) if i > 0 else evaluate
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = execute(*launch)
        results.append((code, said.getvalue()))
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run that takes the last checkpoint, one that keeps the best, and one that finds none to keep."""
    place = ground(tmp_path_factory.mktemp("settling"))
    # Multipliers that ascend trail a target of so few steps; a projection never does.
    often = ("eval.every=1 steps", "prune.target=0.6", "method.constraint=ascent")
    late = ("method.distill_phase=3 steps", "method.warmup=2 steps", "prune.keep_best=true")
    launches = [
        (*words(place, place / "last"), *often, 'stages=["prune", "consolidate", "evaluate"]'),
        (*words(place, place / "best"), *often, *late, "prune.sparsity_epsilon=0.6"),
        (*words(place, place / "none"), *often, *late, "prune.sparsity_epsilon=0"),
    ]
    told = run_world(_said, 1, [*SCORES, 0.1], *launches)[0]
    assert [code for code, _ in told] == [0, 0, 0], told
    return place, [text for _, text in told]


def _done(place, name):
    return json.loads((place / name / "prune" / "done.json").read_text())


def test_gates_that_trail_their_target_are_told_while_training_and_at_the_end(runs):
    place, (said, *_) = runs
    lines = [line for line in said.splitlines() if line.startswith("warning: prune")]
    assert len(lines) == 2
    assert lines[0].startswith("warning: prune step 4: the target has warmed up to 60.0%")
    assert lines[1].startswith("warning: prune: expected sparsity ended at ")
    landing = _done(place, "last")["landing"]
    expected = [line["sparsity/expected"] for line in history(place / "last") if "sparsity/expected" in line][-1]
    assert landing["expected"] == pytest.approx(expected)
    assert landing["gap_points"] == pytest.approx(100 * (0.6 - expected), abs=0.01)
    assert f"{landing['gap_points']:.1f} points short of the target of 60.0%" in lines[1]
    assert sum(landing["cut"].values()) > 0


def test_what_landing_costs_is_measured_and_stands_in_the_report(runs):
    place, (said, *_) = runs
    landing = _done(place, "last")["landing"]
    report = json.loads((place / "last" / "report.json").read_text())
    learned = dict(report["landing"]["learned"])
    assert learned.pop("told") in said
    assert learned == landing
    # The landed model that was measured is the one which is exported: its figures are the compact model's.
    assert landing["metrics_after"] == pytest.approx(report["compact"]["metrics"])
    assert landing["after"] == pytest.approx(report["landing"]["measured"])
    assert landing["metrics_before"] == _done(place, "last")["metrics"]
    assert "pruning did not track its target: expected sparsity ended at" in said


def test_the_best_checkpoint_that_reached_the_target_is_kept(runs):
    """Steps 1 and 2 score highest, before the gates are on; step 6 is the last."""
    place, (_, said, _) = runs
    assert _done(place, "best")["checkpoint"].endswith("step-00000004")
    assert _done(place, "best")["metrics"] == {"accuracy": 0.7}
    assert "exporting step-00000004, the best one at which the target was reached" in said
    expected = {line["step"]: line.get("sparsity/expected") for line in history(place / "best") if "lr/weights" in line}
    assert _done(place, "best")["landing"]["expected"] == pytest.approx(expected[4])


def test_where_no_evaluation_reached_the_target_the_last_checkpoint_is_exported_and_that_is_said(runs):
    place, (_, _, said) = runs
    assert _done(place, "none")["checkpoint"].endswith("step-00000006")
    assert "exporting step-00000006, the last one: no evaluation came within 0 of the target" in said
    assert _done(place, "none")["landing"]["metrics_after"] == {"accuracy": 0.1}
