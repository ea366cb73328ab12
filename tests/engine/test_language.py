"""A language model from random weights to a compact one, in one launch."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.folders import language_recipe
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


def _execute(recipe, *overrides):
    from dsprune.cli import guarded
    from dsprune.engine.launch import execute

    return guarded(lambda: execute(str(recipe), overrides))


def test_a_decoder_is_trained_pruned_and_exported(tmp_path):
    recipe = language_recipe(tmp_path)
    assert run_world(_execute, 2, recipe) == [0, 0]
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    dense, compact = report["dense"], report["compact"]
    vocabulary = json.loads((tmp_path / "dense" / "config.json").read_text())["vocab_size"]
    assert 1 < dense["metrics"]["perplexity"] < vocabulary / 2
    assert dense["metrics"]["word_perplexity"] > dense["metrics"]["perplexity"]
    assert report["landing"]["measured"] >= 0.5
    model = AutoModelForCausalLM.from_pretrained(run / "recovered")
    assert sum(p.numel() for p in model.parameters()) == compact["parameters"]["total"]
    best = json.loads((run / "teacher" / "done.json").read_text())["metrics"]
    assert best["perplexity"] == pytest.approx(dense["metrics"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.from_scratch=false",), "say model.from_scratch=true"),
        (("prune.start=pretrained",), "there are no pretrained weights for the student"),
        (("task.max_length=100",), "task.max_length = 100: the model has 64 positions"),
        (("distill.top_k=100000",), "give fewer, or leave it out"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path, capfd, overrides, message):
    recipe = language_recipe(tmp_path)
    from tests.helpers.world import run_to_the_end

    ending = run_to_the_end(_execute, 1, recipe, *overrides)
    assert ending.codes[0] in (64, 65)
    errors = [line for line in ending.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
