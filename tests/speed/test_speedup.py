"""`prune.speedup`: a run that is held to milliseconds, from the table to the report."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from dsprune.config import load_config
from dsprune.errors import ConfigError
from dsprune.methods import method_options
from dsprune.structure import analyze
from tests.helpers.runs import execute, ground, words
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, build_trainer
from tests.helpers.world import run_world
from tests.speed.formula import formula_table

pytestmark = pytest.mark.dist

STAGES = 'stages=["prune", "consolidate", "evaluate"]'
FAST = ("eval.bench_batch=4", "eval.bench_length=16")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, its teacher, and a table made by hand."""
    folder = ground(tmp_path_factory.mktemp("speedup"))
    formula_table(analyze(BertForSequenceClassification.from_pretrained(folder / "teacher"))).save(folder / "t.json")
    return folder


def _words(place, run, speedup):
    table = (f"latency.table={place / 't.json'}", "latency.allow_foreign=true")
    return (*words(place, place / run), *table, *FAST, f"prune.speedup={speedup}", STAGES)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_held_to_a_speedup_and_says_what_it_measured(place, ranks):
    assert run_world(execute, ranks, *_words(place, f"run{ranks}", 1.5)) == [0] * ranks
    run = place / f"run{ranks}"
    report = json.loads((run / "report.json").read_text())["landing"]
    speedup, landed = report["speedup"], report["speedup"]["landed"]
    assert report["of"] == "the milliseconds of a batch of 4 at length 16 on a device (float32)"
    assert speedup["asked"] == landed["asked"] == 1.5
    assert speedup["predicted"] == landed["predicted"] == pytest.approx(1 / (1 - report["measured"]))
    assert landed["measured"] in [measured for _, measured in landed["tried"]]
    # Made for the speedup that was asked for, as if the table were right: two heads and some neurons are coarse.
    assert 1.5 <= landed["tried"][0][0] < 1.7
    off = abs(landed["measured"] / 1.5 - 1)
    assert landed["missed"] is (off > 0.05)
    assert ("because" in landed["told"]) is landed["missed"]
    card = (run / "compact" / "README.md").read_text()
    assert f"1.5 times the dense model's speed, in {report['of']}; predicted {landed['predicted']:.2f}" in card
    kept = json.loads((run / "compact" / "config.json").read_text())["dsprune"]["layers"]
    (chosen,) = (run / "prune" / "checkpoints").glob("step-00000006/selection.safetensors")
    assert sum(layer["ffn_dim"] for layer in kept) == sum(
        int((row != 0).sum()) for row, on in zip(*(load_file(chosen)[k] for k in ("ffn_dim", "ffn")), strict=True) if on
    )


def test_a_speedup_out_of_reach_names_the_one_that_is_not(place):
    assert run_world(execute, 2, *_words(place, "far", 4000)) == [64, 64]
    said = (place / "far" / "failures" / "rank0.json").read_text()
    assert (
        "prune.speedup = 4000 in the milliseconds of a batch of 4 at length 16 on a device (float32) is out of reach"
        in said
    )
    assert ", 60.0x as fast" in said
    assert not (place / "far" / "prune").exists()


def _choice(setup):
    trainer = build_trainer(setup)
    for step in range(trainer.total_steps):
        trainer.step(step)
    trainer.replica.check_equal(trainer.world, trainer.total_steps)
    return {kind: gate.numpy() for kind, gate in trainer.replica.method.select().gates.items()}


@pytest.mark.parametrize("row", ROWS[:1], ids=lambda row: row.name)
def test_the_choice_is_the_same_on_all_ranks_and_at_every_stage(row):
    """One table, one choice of units: on one rank, and on each of two at ZeRO-3."""
    (alone,) = run_world(_choice, 1, Setup(row=row, of="time"))
    for gates in run_world(_choice, 2, Setup(row=row, of="time", stage=3)):
        for kind, gate in gates.items():
            assert torch.equal(torch.from_numpy(gate) != 0, torch.from_numpy(alone[kind]) != 0), kind


TOML = """
[model]
name = "nowhere"
[task]
name = "sst2"
[prune]
{prune}
"""


@pytest.mark.parametrize(
    ("prune", "overrides", "said"),
    [
        ("speedup = 2\ntarget = 0.5", (), "prune.speedup = 2 does not go with prune.target: leave out either"),
        ("", ("prune.speedup=2", "prune.target=0.5"), "does not go with prune.target"),
        ("", ("prune.speedup=2", "prune.target_of=macs"), "does not go with prune.target_of"),
        ("speedup = 2", ("shape.heads=1",), r"does not go with \[shape\]"),
        ("speedup = 2", ("shape.uniform=true",), r"does not go with \[shape\]"),
        ("speedup = 2", ("prune.embedding_rank=8",), "does not go with prune.embedding_rank"),
        ("speedup = 2", ("latency.runtime=compile",), "latency.runtime"),
        ("speedup = 1", (), "greater than 1"),
        ("speedup = 0.5", (), "greater than 1"),
    ],
)
def test_what_does_not_go_with_a_speedup_is_refused(prune, overrides, said, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML.format(prune=prune))
    with pytest.raises(ConfigError, match=said):
        load_config(str(path), overrides, method_options=method_options)


def test_an_override_wins_over_the_kind_of_target_that_a_recipe_has(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML.format(prune='target = 0.5\ntarget_of = "macs"'))
    config = load_config(str(path), ["prune.speedup=3"], method_options=method_options)
    assert config.prune.speedup == 3
    path.write_text(TOML.format(prune="speedup = 3"))
    config = load_config(str(path), ["prune.target=0.4"], method_options=method_options)
    assert (config.prune.speedup, config.prune.target) == (None, 0.4)
