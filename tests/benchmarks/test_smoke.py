"""Every benchmark at its smallest, through its own arguments: what README's figures come from must keep running."""

import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import BertForSequenceClassification

from dsprune.consolidate import apply_selection
from dsprune.structure import Selection, analyze
from tests.benchmarks import consolidation, memory
from tests.helpers.folders import tiny_folder
from tests.helpers.models import tiny_model
from tests.helpers.selections import random_gates
from tests.helpers.world import run_world

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.dist
COMMAND = re.compile(r"(?:python -m|--module) tests\.benchmarks\.(\w+)(.*)")
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("test_", "__")))


def _main(name):
    return importlib.import_module(f"tests.benchmarks.{name}").main


def _printed(name, arguments):
    """What a benchmark prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _main(name)([str(word) for word in arguments])
    return out.getvalue()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("benchmarks") / "dense")


def _commands():
    """Each command line that README or a benchmark itself shows."""
    sources = [ROOT / "README.md", *(Path(__file__).parent / f"{name}.py" for name in NAMES)]
    found = [match for source in sources for match in COMMAND.findall(source.read_text(encoding="utf-8"))]
    return sorted({(name, words.partition("#")[0].strip()) for name, words in found})


@pytest.mark.parametrize(("name", "words"), _commands(), ids=lambda value: value or "alone")
def test_commands_that_are_shown_are_understood(name, words):
    importlib.import_module(f"tests.benchmarks.{name}").make_parser().parse_args(shlex.split(words))


def test_every_benchmark_shows_its_command():
    assert {name for name, _ in _commands()} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "words", "rows"),
    [
        ("step_cost", ["--stage", 0, 3, "--method", "cofi", "grain", "--steps", 2, "--warmup", 1, "--batch", 4], 4),
        ("checkpoint_cost", ["--stage", 3, "--saves", 2, "--warmup", 1, "--batch", 4, "--every", 10], 1),
    ],
)
def test_what_trains_on_ranks(name, words, rows, dense):
    (text,) = run_world(_printed, 1, name, [*words, "--model", dense])
    table = [line for line in text.splitlines() if line.startswith("ZeRO")]
    assert len(table) == rows
    assert "1 rank(s)" in text


def test_memory(dense, capsys):
    memory.main(["--model", str(dense), "--ranks", "1", "--batch", "2", "--length", "16"])
    text = capsys.readouterr().out
    measured, planned = re.search(r"^ *1 +([\d.]+) +([\d.]+)", text, re.MULTILINE).groups()
    assert float(measured) >= 0
    assert float(planned) > 0


def test_packed_attention(tmp_path, capsys):
    model = tiny_model("bert")
    assert isinstance(model, BertForSequenceClassification)
    structure = analyze(model)
    gates = random_gates(structure, 2)
    gates |= {kind: gates[kind].new_ones(gates[kind].shape) for kind in ("attn_row", "ffn_row", "hidden", "attn")}
    apply_selection(model, Selection.from_gates(structure, gates)).save_pretrained(tmp_path / "compact")
    model.save_pretrained(tmp_path / "dense")
    sizes = ["--batch", "1", "2", "--length", "8", "--runs", "1"]
    _main("packed_attention")(["--model", str(tmp_path / "compact"), "--dense", str(tmp_path / "dense"), *sizes])
    text = capsys.readouterr().out
    assert "over loop" in text
    assert "over dense" in text
    assert float(text.rpartition("differ by ")[2]) < 1e-5


SMALL = ["--layers", "1", "--hidden", "64", "--vocabulary", "100"]


def test_the_checkpoint_that_consolidation_is_measured_on(tmp_path):
    from dsprune.consolidate import consolidate

    options = consolidation.make_parser().parse_args([*SMALL, "--folder", str(tmp_path)])
    counts = run_world(consolidation.save, 2, tmp_path / "run", 1, options)
    report = consolidate(tmp_path / "run", tmp_path / "out")
    assert counts == [report.dense_parameters] * 2


@pytest.mark.slow
def test_consolidation(tmp_path, capsys):
    """Four processes with torch in them: half a minute."""
    where = ["--folder", str(tmp_path / "scratch"), "--json", str(tmp_path / "rows.json")]
    consolidation.main([*SMALL, *where])
    assert "bound: 200 MB" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"].split()[0] for row in rows] == ["dsprune", "the", "zero_to_fp32", "cp"]
    assert all(row["seconds"] > 0 for row in rows)
    assert not (tmp_path / "scratch").exists()


def test_compact_speed(dense, capsys):
    sizes = ["--batch", "1", "2", "--length", "8", "--runs", "1"]
    _main("compact_speed")(["--model", str(dense), "--density", "0.4", "--padded", *sizes])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("cofi", "grain"))]
    assert len(rows) == 4
    # Efficiency is the speedup over the ratio of multiply-adds; each is printed rounded.
    for row in rows:
        speedup, ratio, efficiency = (float(text.rstrip("x")) for text in row[-3:])
        assert ratio > 1
        assert efficiency == pytest.approx(speedup / ratio, abs=0.02)
