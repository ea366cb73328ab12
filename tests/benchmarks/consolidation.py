"""Memory and time of consolidation on a real ZeRO-3 checkpoint of two ranks, beside zero_to_fp32 and a plain copy.

    python -m tests.benchmarks.consolidation --layers 24 12 --folder /tmp/consolidation

Memory is RssAnon (mapped file pages apart) at its peak, above that of an interpreter with torch imported. The model
is BERT-large in width, random weights; 24 layers are 335 million parameters, and need about 6 GB on disk. `--hidden`
and `--vocabulary` make it smaller.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsprune.measure.tables import render_table

ROOT = str(Path(__file__).resolve().parents[2])
HEAD_DIM = 64


def save(folder: Path, layers: int, options: argparse.Namespace) -> int:
    """One rank: a model, one training step, one committed checkpoint; returns the number of parameters."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from dsprune.config import BatchConfig, DataConfig, TaskConfig
    from dsprune.engine.checkpoints.store import CheckpointStore, Snapshot, save_verification_batch
    from dsprune.engine.learning.student import Student, build_student_engine
    from dsprune.engine.ranks.world import start_world
    from dsprune.engine.zero.config import load_ds_config, plan_batch, student_config
    from dsprune.structure import Selection, analyze
    from dsprune.tasks import build_task
    from tests.helpers.selections import random_gates

    world = start_world()
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=layers,
        num_attention_heads=options.hidden // HEAD_DIM,
        intermediate_size=4 * options.hidden,
        vocab_size=options.vocabulary,
    )
    model = BertForSequenceClassification(config)
    structure = analyze(model)
    count = sum(p.numel() for p in model.parameters())
    task = build_task(TaskConfig(name="order"), DataConfig(), seed=0)
    ds_config = student_config(load_ds_config("zero3"), plan_batch(BatchConfig(size=2), world.size), clip=1.0)
    engine = build_student_engine(Student(model, task), ds_config, lr=1e-5, weight_decay=0.0)
    ids = torch.randint(5, options.vocabulary, (1, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    num_targets = torch.ones(())  # without it the engine answers with predictions
    loss, *_ = engine(dict(batch), torch.zeros(1, dtype=torch.long), num_targets)
    engine.backward(loss)
    engine.step()

    def describe(path: Path) -> None:
        (path / "model").mkdir()
        text = json.dumps({**config.to_dict(), "architectures": ["BertForSequenceClassification"]})
        (path / "model" / "config.json").write_text(text)
        save_verification_batch(path / "verify.safetensors", batch)
        gates = random_gates(structure, 0)
        Selection.from_gates(structure, gates).save(path / "selection.safetensors")

    store = CheckpointStore(folder / "prune" / "checkpoints", "prune", world, keep=1, method="random")
    store.save(engine, Snapshot(1, {}, {}, None, describe, {}), None)
    return count


def _rss_anon(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def _watch(*command: str) -> tuple[float, float]:
    """Peak RssAnon in MB and seconds of a command."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": ROOT, "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _rss_anon(process.pid))
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return peak / 1e6, time.perf_counter() - began


def measure(layers: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model size."""
    from tests.helpers.world import run_world

    folder = options.folder
    run = folder / f"run{layers}"
    count = run_world(save, 2, run, layers, options, timeout=1200)[0]
    checkpoint = run / "prune" / "checkpoints" / "step-00000001"
    base, _ = _watch(sys.executable, "-c", "import torch, time; time.sleep(0.5)")
    consolidate = [sys.executable, "-m", "dsprune", "consolidate", str(checkpoint)]
    convert = "import sys; from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as c; "
    convert += "c(sys.argv[1], sys.argv[2], tag='student')"
    source = folder / f"weights{layers}"
    source.write_bytes(os.urandom(2**20) * math.ceil(count * 4 / 2**20))
    commands = {
        "dsprune consolidate": [*consolidate, str(folder / f"out{layers}")],
        "the same, --skip-hashes": [*consolidate, str(folder / f"fast{layers}"), "--skip-hashes"],
        "zero_to_fp32": [sys.executable, "-c", convert, str(checkpoint), str(folder / f"fp32-{layers}")],
        "cp of as many bytes": ["cp", str(source), str(folder / f"copy{layers}")],
    }
    rows = []
    for name, command in commands.items():
        peak, seconds = _watch(*command)
        above = peak - base if "cp" not in name else None
        rows.append({"layers": layers, "parameters": count, "what": name, "anon_mb": above, "seconds": seconds})
    shutil.rmtree(folder)
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 12])
    parser.add_argument("--hidden", type=int, default=1024, help=f"width, a multiple of {HEAD_DIM} (1024)")
    parser.add_argument("--vocabulary", type=int, default=30522, help="tokens (30522)")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; removed at the end")
    parser.add_argument("--json", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    rows = []
    for layers in options.layers:
        options.folder.mkdir(parents=True)
        rows += measure(layers, options)
    largest = max(options.vocabulary, 4 * options.hidden) * options.hidden * 4 / 1e6
    cells = [
        [
            str(r["layers"]),
            f"{r['parameters']:,}",
            r["what"],
            "-" if r["anon_mb"] is None else f"{r['anon_mb']:.0f}",
            f"{r['seconds']:.1f}",
        ]
        for r in rows
    ]
    print(render_table(["layers", "parameters", "command", "peak MB", "seconds"], cells))
    print(f"bound: 200 MB + 4 x the largest tensor ({largest:.0f} MB) = {200 + 4 * largest:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
