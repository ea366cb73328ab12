"""From a command line to a finished run: `deepspeed dsprune/train.py` and `dsprune train` both end here."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import dsprune
from dsprune.config import RunConfig, load_config
from dsprune.engine.zero.requirements import check_requirements
from dsprune.errors import ConfigError
from dsprune.methods import method_options
from dsprune.run_folder import RunFolder

__all__ = ["execute", "launch", "plan_text"]

logger = logging.getLogger(__name__)


def load(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """Read and check a recipe with its overrides."""
    return load_config(recipe, overrides, method_options=method_options)


def plan_text(recipe: str, overrides: Sequence[str]) -> str:
    """What `--dry-run` prints; nothing is trained, and neither weights nor data are touched.

    But for tasks that find their labels in the training examples, which `build_task` reads.
    """
    config = load(recipe, overrides)
    check_requirements()
    from dsprune.run.preflight import preflight
    from dsprune.run.preflight.plan import describe_plan

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return describe_plan(config, preflight(config, world_size), world_size)


def execute(recipe: str, overrides: Sequence[str]) -> None:
    """Run a recipe's stages on this rank. All ranks of the launch must call.

    Raises:
        DspruneError: on every rank, whichever rank it happened on.
        Preempted: on every rank, the run having been asked to stop.
    """
    config = load(recipe, overrides)
    check_requirements()
    from dsprune.engine.ranks.stop import Stop

    stop = Stop().listen()
    import transformers

    from dsprune.engine.ranks.world import start_world
    from dsprune.run.preflight import preflight
    from dsprune.run.session import Session

    transformers.utils.logging.disable_progress_bar()
    findings = preflight(config, int(os.environ.get("WORLD_SIZE", "1")))
    with Session(config, start_world(config.cluster.timeout_minutes), stop) as session:
        session.run_stages(findings)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(recipe: str, overrides: Sequence[str], *, ranks: int | None) -> int:
    """Start train.py under DeepSpeed's launcher on this machine; returns the run's exit code.

    Args:
        recipe: shipped name or path.
        overrides: `key=value`.
        ranks: processes to start; by default the number of GPUs, or 1.

    Raises:
        ConfigError: any mistake that can be seen without starting ranks.
    """
    config = load(recipe, overrides)
    check_requirements()
    import torch

    from dsprune.run.supervise import supervise

    gpus = torch.cuda.device_count()
    if ranks is not None and gpus and ranks > gpus:
        raise ConfigError(f"--ranks {ranks}: this machine has {gpus} GPU(s)")
    count = ranks or gpus or 1
    environment = dict(os.environ)
    if not gpus:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    script = str(Path(dsprune.__file__).parent / "train.py")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(count)]
    command = [*launcher, "--master_port", str(_free_port()), script, recipe, *overrides]
    return supervise(command, environment, RunFolder(config.output))
