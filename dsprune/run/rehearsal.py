"""The first step of every training stage, on two layers, before any stage begins.

What a configuration asks of DeepSpeed meets the gates for the first time in the pruning stage, hours after the start:
a dtype, an offloading, a section that no check knows. So a launch takes that step at once, with random weights, at the
real widths, in the real engines, by the very code of the stages. It takes seconds, and leaves no trace in the run.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dsprune
from dsprune.arch import family_for
from dsprune.config import RunConfig, ShapeConfig
from dsprune.consolidate import apply_selection
from dsprune.engine.learning.batches import Batches, to_device
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.learning.trainer import Trainer
from dsprune.engine.models.load import checkpoint_activations
from dsprune.engine.models.skeleton import compact_facts
from dsprune.engine.ranks.stop import Stop
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.config import BatchPlan, dtype_of, zero_stage
from dsprune.engine.zero.gather import release
from dsprune.errors import ConfigError, DspruneError, NumericsError
from dsprune.files import write_json
from dsprune.methods import Method, Plan, method_class
from dsprune.pretrained import read_model_config, resolve_source
from dsprune.run.preflight import Preflight, dense_skeleton
from dsprune.run.run import Run
from dsprune.run.status import lost_a_peer
from dsprune.run.teaching import plan_teaching, teacher_shape
from dsprune.run_folder import TRAINING_STAGES, StageName
from dsprune.structure import Selection, analyze, ones
from dsprune.tasks import Encoded

__all__ = ["rehearse"]

COMPACT, TEACHER = "compact-two", "teacher-two"
"""Folders of the models that stand for those of the run."""
LAYERS = 2
"""Layers of each stack."""
ACCUMULATION = 2
"""Micro-batches of the step at most: one that is kept, and one that ends it."""
TARGET = 0.1
"""Sparsity that two layers are asked for at most: what the whole model can lose, they may not."""
FILLED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
)
"""Keys of a DeepSpeed configuration that the recipe decides."""


class _StepTaken(Exception):
    """Ends a stage that has nothing more to rehearse."""


class _LongestFirst(Batches):
    """Training data whose every step has the longest examples.

    Args:
        whole: of the run.
        plan: how a step of the rehearsal divides.
    """

    def __init__(self, whole: Batches, plan: BatchPlan) -> None:
        super().__init__(whole.data, plan, whole.world, whole.seed)
        self.steps_per_epoch = whole.steps_per_epoch
        self._longest = _longest(whole.data, plan.size)

    def indices(self, step: int) -> Tensor:
        return self._longest


def _longest(data: Encoded, count: int) -> Tensor:
    return data.lengths.argsort(descending=True, stable=True)[:count]


class _TwoLayers(Run):
    """A run that takes the first step of a stage and no more. Nothing is written to its folder.

    Args:
        run: that is rehearsed.
        stage: whose step is to be taken.
        folder: for configurations without weights, on this rank.
    """

    teachers_have_weights = False

    def __init__(self, run: Run, stage: str, folder: Path) -> None:
        self.whole = run
        config, ready = _reduced(run, stage, folder)
        super().__init__(config, ready, run.data, run.world, run.journal, Stop(), run.provenance)
        self.batches: Batches = _LongestFirst(run.batches, ready.batch)

    @property
    def compact_source(self) -> Path:
        return self.folder.root.parent / COMPACT

    @property
    def recovered_source(self) -> Path:
        return self.compact_source

    def _method(self) -> Method:
        """The method as in the whole run, phases included, but for what two layers cannot lose."""
        plan = self.whole._method().plan
        shape = _reduced_shape(plan.shape, self.whole.ready.structure.sizes.num_layers)
        gentle = replace(plan, target=min(plan.target, TARGET), target_of="encoder", shape=shape)
        return method_class(self.config.method.name)(self.ready.structure, self.config.method.options, gentle)

    def _block_plan(self, total: int) -> Plan:
        plan = super()._block_plan(total)
        return replace(plan, target=min(plan.target, TARGET))

    def _load_student(self, source: str | None, ds_config: Mapping[str, Any]) -> PreTrainedModel:
        if source != str(self.compact_source):
            return super()._load_student(source, ds_config)
        dense = super()._load_student(None, {})
        structure = analyze(dense)
        gates = ones(structure, ("ffn_dim",))
        gates["ffn_dim"][0, 0] = 0  # layers of unlike sizes, which no stock class has
        empty = method_class(self.config.method.name).empty
        model: Any = apply_selection(dense, Selection.from_gates(structure, gates, empty=empty))
        if zero_stage(ds_config) == 3:
            model.to(dtype_of(ds_config))
        if self.config.student.activation_checkpointing:
            checkpoint_activations(model)
        return model  # type: ignore[no-any-return]

    def _look_at(self, teacher: Teacher) -> None:
        """Nothing: this one knows nothing."""

    def _trainer(self, stage: str, *args: Any, **kwargs: Any) -> Trainer:
        return super()._trainer(f"rehearsal of stage '{stage}'", *args, **kwargs)

    def _train(self, trainer: Trainer, about: Mapping[str, Any]) -> tuple[Path, dict[str, float]]:
        """The first gated step, and an evaluation batch. Collective.

        Raises:
            _StepTaken: when that is done; the engines are released.
        """
        step = trainer.replica.method.gates_from if trainer.replica else 0
        while not trainer.step(step).applied:  # fp16 looks for its loss scale
            pass
        data = next(iter(self.data.evals.values()))
        inputs, labels, _ = to_device(data.collate(_longest(data, self.config.batch.eval)), self.world)
        with torch.no_grad():
            self._forward(trainer, step + 1)(inputs, labels)
        release(trainer.engine, *([trainer.teacher.engine] if trainer.teacher else []))
        raise _StepTaken


def _reduced(run: Run, stage: str, folder: Path) -> tuple[RunConfig, Preflight]:
    """Configuration and findings for two layers of the run's models, whose configurations go to `folder`."""
    config = run.config
    dense = resolve_source(config.model.name)
    given = resolve_source(config.teacher.path) if config.teacher.path is not None else dense
    # A compact teacher has no configuration of two layers; the student's stands for it.
    teacher = dense if compact_facts(given) is not None else given
    revision = config.model.revision
    depths = {
        name: _write_shallow(source, revision if source == dense else None, folder / name)
        for name, source in (("student", dense), (TEACHER, teacher), (COMPACT, dense))
    }
    with_embeddings = 0 in run.ready.teaching.layers
    layers = tuple(range(0 if with_embeddings else 1, depths[TEACHER] + 1))
    teaches = stage != "teacher"
    parts = {
        "output": str(folder / "run"),
        "model": config.model.model_copy(
            update={"name": str(folder / "student"), "revision": None, "from_scratch": True}
        ),
        "teacher": config.teacher.model_copy(update={"path": str(folder / TEACHER) if teaches else None}),
        "prune": config.prune.model_copy(update={"start": "pretrained"}),
        "distill": config.distill.model_copy(update={"teacher_layers": layers, "layer_pairs": None}),
    }
    reduced = config.model_copy(update=parts)
    batch = run.ready.batch
    accumulation = min(batch.accumulation, ACCUMULATION)
    plan = replace(batch, size=batch.world_size * batch.micro * accumulation, accumulation=accumulation)
    student_ds = copy.copy(run.ready.student_ds)
    student_ds |= {"train_batch_size": plan.size, "gradient_accumulation_steps": accumulation}
    structure = analyze(dense_skeleton(reduced, run.task))
    teaching = plan_teaching(reduced, structure, teacher_shape(reduced, run.task, structure))
    return reduced, replace(run.ready, batch=plan, structure=structure, student_ds=student_ds, teaching=teaching)


def _write_shallow(source: str, revision: str | None, folder: Path) -> int:
    """Write the configuration of a model's first layers, and nothing else; returns how many there are in all stacks."""
    config = read_model_config(source, revision)
    table = json.loads(config.to_json_string(use_diff=False))
    family = family_for(config.model_type)
    counts = {name: min(LAYERS, getattr(config, name)) for name in (family.sizes[s.count] for s in family.stacks)}
    table |= counts
    if table.get("layer_types"):
        table["layer_types"] = table["layer_types"][: max(counts.values())]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table), encoding="utf-8")
    return sum(counts.values())


def _reduced_shape(shape: ShapeConfig, num_layers: int) -> ShapeConfig:
    """The sizes asked for; where layers are to go, one of the two goes."""
    if shape.layers is None:
        return shape
    return shape.model_copy(update={"layers": LAYERS if shape.layers >= num_layers else 1})


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


def _takes_steps(run: Run, stage: StageName) -> bool:
    """Whether a stage of this launch trains: it is neither finished, nor given, nor of no length."""
    if stage not in TRAINING_STAGES or run.is_done(stage):
        return False
    if stage == "teacher" and run.config.teacher.path is not None:
        return False
    return bool(getattr(run.config, stage).duration.steps(run.batches.steps_per_epoch) > 0)


def _take_step(run: Run, stage: StageName) -> None:
    with tempfile.TemporaryDirectory(prefix="dsprune-rehearsal-") as folder:
        try:
            getattr(_TwoLayers(run, stage, Path(folder)), f"_{stage}")()
        except _StepTaken:
            return
        except NumericsError as error:
            if run.world.is_main:
                write_json(run.folder.numerics, error.details)
            raise
        except DspruneError:
            raise
        except Exception as error:
            if lost_a_peer(error):
                raise
            raise _told(run, stage, error) from error


def rehearse(run: Run) -> None:
    """Take the first step of each training stage of this launch on two layers. Collective: all ranks must call.

    Nothing is left of it: engines and their memory are released, and random numbers go on as if it had not been.

    Raises:
        DspruneError: a stage would fail; a rank that fails alone leaves, and the others learn of it as in any step.
    """
    stages = [stage for stage in run.config.stages if _takes_steps(run, stage)]
    began = time.perf_counter()
    with _undisturbed(run.world):
        for stage in stages:
            _take_step(run, stage)
            release()
    if stages:
        seconds = time.perf_counter() - began
        run.journal.say(f"rehearsed the first step of {', '.join(stages)} on two layers in {seconds:.1f} s")


def _told(run: Run, stage: str, error: Exception) -> ConfigError:
    """What stopped a first step, in one line; its traceback goes into the run folder."""
    lines = str(error).strip().splitlines() or ["no message"]
    package = Path(dsprune.__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if package in Path(f.filename).parents]
    place = f"{Path(frames[-1].filename).relative_to(package.parent)}, line {frames[-1].lineno}" if frames else "?"
    path = run.folder.failures / f"rehearsal-rank{run.world.rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    engines = [("student", run.ready.student_ds)] + ([("teacher", run.ready.teacher_ds)] if stage != "teacher" else [])
    names = "; ".join(
        f"deepspeed.{name} = {getattr(run.config.deepspeed, name)} ({', '.join(_switched_on(ds))})"
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
