"""A checkpoint becomes a model folder, which proves itself, in a process of its own while the ranks wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import dsprune
from dsprune.engine.ranks.stop import Stop, unheard
from dsprune.engine.ranks.world import World
from dsprune.errors import CheckpointError, Preempted

__all__ = ["export", "start_export"]

WAIT_SECONDS = 0.5
"""Between two looks at the process."""


def export(checkpoint: Path, out: Path, world: World, stop: Stop) -> None:
    """Consolidate a checkpoint, and see that the result answers as the engine did. Collective: all ranks must call.

    Args:
        checkpoint: committed.
        out: folder of the model.
        world: the ranks.
        stop: tells whether this rank was asked to stop.

    Raises:
        CheckpointError: it failed, with the last line of what it said.
        Preempted: the run was asked to stop meanwhile.
    """
    with world.together("consolidating"):
        process = start_export(checkpoint, out) if world.is_main else None
        # Short collectives instead of one long wait: a large model takes longer than any time-out.
        while (code := world.broadcast(process.poll() if process else None)) is None:
            if (reason := stop.agreed(world)) is not None:
                if process is not None:
                    process.kill()  # what it wrote so far has no name yet
                    process.wait()
                raise Preempted(f"stopped by {reason} while consolidating; start the same command again to go on")
            time.sleep(WAIT_SECONDS)
        if process is not None and code != 0:
            output = process.stdout.read() if process.stdout else ""
            lines = output.strip().splitlines() or ["no output"]
            raise CheckpointError(f"consolidating {checkpoint} failed with exit code {code}: {lines[-1]}")


def start_export(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
    """Start `dsprune consolidate`, which compares what it wrote with what the checkpoint recorded of the engine."""
    root = str(Path(dsprune.__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with unheard():
        return subprocess.Popen(
            [sys.executable, "-m", "dsprune", "consolidate", str(checkpoint), str(out), "--force"],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
