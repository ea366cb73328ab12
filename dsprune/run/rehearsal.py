"""The first step of every training stage, on two layers, before any stage begins.

What a configuration asks of DeepSpeed meets the gates for the first time in the pruning stage, hours after the start:
a dtype, an offloading, a section that no check knows. So a launch takes that step at once, with random weights, at the
real widths, in the real engines, by the very code of the stages. It takes seconds, and leaves no trace in the run.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dsprune
from dsprune.engine.learning.batches import to_device
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.gather import release
from dsprune.errors import ConfigError, DspruneError, NumericsError
from dsprune.files import write_json
from dsprune.methods.parts import gates_from
from dsprune.run.context import RunContext
from dsprune.run.stages.table import TRAINING_CLASSES
from dsprune.run.status import lost_a_peer
from dsprune.run.training.scoring import answering, evaluation_gates
from dsprune.run.two_layers import longest, two_layers_of
from dsprune.run_folder import StageName

__all__ = ["rehearse"]

FILLED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
)
"""Keys of a DeepSpeed configuration that the recipe decides."""


def rehearse(context: RunContext) -> None:
    """Take the first step of each training stage of this launch on two layers. Collective: all ranks must call.

    Nothing is left of it: engines and their memory are released, and random numbers go on as if it had not been.

    Raises:
        DspruneError: a stage would fail; a rank that fails alone leaves, and the others learn of it as in any step.
    """
    stages = [stage for stage in context.config.stages if _takes_steps(context, stage)]
    began = time.perf_counter()
    with _undisturbed(context.world):
        for stage in stages:
            _rehearse_stage(context, stage)
            release()
    if stages:
        seconds = time.perf_counter() - began
        context.journal.say(f"rehearsed the first step of {', '.join(stages)} on two layers in {seconds:.1f} s")


def _takes_steps(context: RunContext, name: StageName) -> bool:
    """Whether a stage of this launch trains: it is neither finished, nor given, nor of no length."""
    if name not in TRAINING_CLASSES or context.is_done(name):
        return False
    stage = TRAINING_CLASSES[name](context)
    return stage.nothing_to_do() is None and stage.total_steps > 0


def _rehearse_stage(context: RunContext, stage: StageName) -> None:
    """A stage's first step, or what stops it in one line. Collective: all ranks must call."""
    with tempfile.TemporaryDirectory(prefix="dsprune-rehearsal-") as folder:
        try:
            _take_step(two_layers_of(context, stage, Path(folder)), stage)
        except NumericsError as error:
            if context.world.is_main:
                write_json(context.folder.numerics, error.details)
            raise
        except DspruneError:
            raise
        except Exception as error:
            if lost_a_peer(error):
                raise
            raise _told(context, stage, error) from error


def _take_step(context: RunContext, stage: StageName) -> None:
    """The first gated step of a stage, and an evaluation batch. Collective: all ranks must call."""
    training = TRAINING_CLASSES[stage](context).prepare(f"rehearsal of stage '{stage}'")
    trainer = training.trainer
    step = gates_from(trainer.replica.method) if trainer.replica else 0
    while not trainer.step(step).applied:  # fp16 looks for its loss scale
        pass
    data = next(iter(context.data.evals.values()))
    inputs, labels, _ = to_device(data.collate(longest(data, context.config.batch.eval)), context.world)
    with torch.no_grad():
        answering(trainer, evaluation_gates(trainer, step + 1))(inputs, labels)
    training.release()


@contextmanager
def _undisturbed(world: World) -> Iterator[None]:
    """What is random inside leaves no trace outside, and only what is made inside is looked at for garbage."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if world.device.type == "cuda" else []
    gc.freeze()  # hundreds of thousands of objects that imports made
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        gc.unfreeze()
        random.setstate(states[0])
        np.random.set_state(states[1])


def _told(context: RunContext, stage: StageName, error: Exception) -> ConfigError:
    """What stopped a first step, in one line; its traceback goes into the run folder."""
    lines = str(error).strip().splitlines() or ["no message"]
    package = Path(dsprune.__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if package in Path(f.filename).parents]
    place = f"{Path(frames[-1].filename).relative_to(package.parent)}, line {frames[-1].lineno}" if frames else "?"
    path = context.folder.failures / f"rehearsal-rank{context.world.rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    engines = [("student", context.findings.student_ds)] + (
        [("teacher", context.findings.teacher_ds)] if stage != "teacher" else []
    )
    names = "; ".join(
        f"deepspeed.{name} = {getattr(context.config.deepspeed, name)} ({', '.join(_switched_on(ds))})"
        for name, ds in engines
    )
    return ConfigError(
        f"stage '{stage}' would fail at its first step: {type(error).__name__}: {lines[0]} ({place}): change what it "
        f"runs with: {names}; the traceback is in {path}"
    )


def _switched_on(ds_config: Mapping[str, Any]) -> list[str]:
    """What a configuration turns on beside the recipe, section by section."""
    found = []
    for section, table in ds_config.items():
        if section in FILLED or table in (None, False, "auto"):
            continue
        if not isinstance(table, Mapping):
            found.append(f"{section} = {table}")
        elif section == "zero_optimization":
            found += [f"{section}.{key}" + (f" = {value}" if key == "stage" else "") for key, value in table.items()]
        elif table.get("enabled", True) is not False:
            found.append(section)
    return found
