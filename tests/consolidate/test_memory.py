"""Consolidation's memory is bounded by a tensor, not by the model: the same for two layers and for twelve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from dsprune.structure import Selection, analyze
from tests.helpers.checkpoints import write_run
from tests.helpers.selections import random_gates

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")

# Prints how far anonymous memory rises above that of the imports, in kB.
PROGRAM = """
import sys, threading
import accelerate
from dsprune.consolidate import consolidate

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1])

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

before, seen, done = anonymous(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
consolidate(sys.argv[1], sys.argv[2])
done.set()
watcher.join()
print(max(seen) - before)
"""


def _rise(folder: Path, num_layers: int) -> float:
    """Peak anonymous memory of one consolidation, in MB."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config)
    structure = analyze(model)
    run = write_run(folder, model, selection=Selection.from_gates(structure, random_gates(structure, 0)))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(run), str(folder / "out")]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout) / 1000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    layer = 12.6  # MB of one layer
    few, many = _rise(tmp_path / "few", 2), _rise(tmp_path / "many", 12)
    assert many < few + layer
    assert many < 4 * layer
