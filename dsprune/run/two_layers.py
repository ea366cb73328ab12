"""A run scaled down to two layers and one step: the same configuration, and models that are made on the spot."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dsprune.arch import family_for
from dsprune.config import PruneConfig, RunConfig, ShapeConfig
from dsprune.consolidate import apply_selection
from dsprune.engine.learning.batches import Batches
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.models.load import checkpoint_activations
from dsprune.engine.models.skeleton import compact_facts
from dsprune.engine.ranks.stop import Stop
from dsprune.engine.zero.config import BatchPlan, dtype_of, zero_stage
from dsprune.methods import method_class
from dsprune.pretrained import read_model_config, resolve_source
from dsprune.run.context import RunContext
from dsprune.run.models import StoredModels
from dsprune.run.preflight import Preflight, dense_skeleton
from dsprune.run.preflight.teaching import plan_teaching, teacher_shape
from dsprune.run_folder import RunFolder, StageName
from dsprune.structure import Selection, analyze, ones
from dsprune.tasks import Encoded

__all__ = ["longest", "two_layers_of"]

STUDENT, TEACHER = "dense-student", "dense-teacher"
"""Folders of configurations."""
LAYERS = 2
"""Layers of each stack."""
ACCUMULATION = 2
"""Micro-batches of the step at most: one that is kept, and one that ends it."""
TARGET = 0.1
"""Sparsity that two layers are asked for at most: what the whole model can lose, they may not."""


class LongestFirst(Batches):
    """Training data whose every step has the longest examples.

    Args:
        whole: of the run.
        plan: how a step divides.
    """

    def __init__(self, whole: Batches, plan: BatchPlan) -> None:
        super().__init__(whole.data, plan, whole.world, whole.seed)
        self.steps_per_epoch = whole.steps_per_epoch
        self._longest = longest(whole.data, plan.size)

    def indices(self, step: int) -> Tensor:
        return self._longest


def longest(data: Encoded, count: int) -> Tensor:
    """The longest examples of a split: [count]."""
    return data.lengths.argsort(descending=True, stable=True)[:count]


class RandomModels:
    """Models with random weights, from folders that hold a configuration and nothing else.

    Args:
        config: of the scaled-down run.
        findings: of it.
        compact: folder that stands for the compact model, which has lost a neuron.
    """

    def __init__(self, config: RunConfig, findings: Preflight, compact: Path) -> None:
        self.config = config
        self.findings = findings
        self.compact = compact
        self._dense = StoredModels(config, findings)

    def student(self, source: str | None, ds_config: Mapping[str, Any]) -> PreTrainedModel:
        if source != str(self.compact):
            return self._dense.student(None, ds_config)  # whatever it is to start from, there are no weights of it
        dense = self._dense.student(None, {})
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

    def teacher(self, source: str, layers: Sequence[int] = (), *, attentions: bool = False) -> Teacher:
        task, ds_config = self.findings.task, self.findings.teacher_ds
        return Teacher(source, task, ds_config, layers, attentions=attentions, from_scratch=True)


def two_layers_of(context: RunContext, stage: StageName, folder: Path) -> RunContext:
    """A run of two layers of each model, with the widths, engines, methods and data of the whole one.

    Phases begin at the same steps, a step has at most two micro-batches, and nobody can stop it.

    Args:
        context: of the whole run.
        stage: that is to take a step.
        folder: empty, on this rank; for configurations without weights, and in the place of the run folder.
    """
    run = RunFolder(folder / "run")
    config = _reduced_config(context, stage, folder, run)
    findings = _reduced_findings(context, config)
    return replace(
        context,
        config=config,
        findings=findings,
        batches=LongestFirst(context.batches, findings.batch),
        models=RandomModels(config, findings, run.model_of("consolidate")),
        folder=run,
        stop=Stop(),
    )


def _reduced_config(context: RunContext, stage: StageName, folder: Path, run: RunFolder) -> RunConfig:
    """The configuration for two layers of the run's models, whose own configurations go to `folder`."""
    config = context.config
    dense = resolve_source(config.model.name)
    given = resolve_source(config.teacher.path) if config.teacher.path is not None else dense
    # A compact teacher has no configuration of two layers; the student's stands for it.
    teacher = dense if compact_facts(given) is not None else given
    revision = config.model.revision
    _write_shallow(dense, revision, folder / STUDENT)
    _write_shallow(dense, revision, run.model_of("consolidate"))
    teacher_depth = _write_shallow(teacher, revision if teacher == dense else None, folder / TEACHER)
    with_embeddings = 0 in context.findings.teaching.layers
    layers = tuple(range(0 if with_embeddings else 1, teacher_depth + 1))
    model = {"name": str(folder / STUDENT), "revision": None, "from_scratch": True}
    parts = {
        "output": str(run),
        "model": config.model.model_copy(update=model),
        "teacher": config.teacher.model_copy(update={"path": None if stage == "teacher" else str(folder / TEACHER)}),
        "prune": _reduced_target(config.prune, config.shape),
        "blocks": config.blocks.model_copy(update={"target": min(config.blocks.target, TARGET)}),
        "shape": _reduced_shape(config.shape, context.findings.structure.sizes.num_layers),
        "distill": config.distill.model_copy(update={"teacher_layers": layers, "layer_pairs": None}),
    }
    return config.model_copy(update=parts)


def _reduced_target(prune: PruneConfig, shape: ShapeConfig) -> PruneConfig:
    """What two layers can lose, from the pretrained model; where sizes are given, these are the target."""
    # Nothing is measured for two layers: instead of a speedup, parameters.
    gentle: dict[str, Any] = {"start": "pretrained", "target_of": "encoder", "speedup": None}
    if not shape.sizes:
        return prune.model_copy(update={**gentle, "target": min(prune.target, TARGET)})
    # A target beside them is that of the whole model, and is left out: two layers of these sizes have another.
    return PruneConfig(**prune.model_dump(exclude={"target"}) | gentle)


def _reduced_shape(shape: ShapeConfig, num_layers: int) -> ShapeConfig:
    """The sizes asked for; where layers are to go, one of the two goes."""
    if shape.layers is None:
        return shape
    return shape.model_copy(update={"layers": LAYERS if shape.layers >= num_layers else 1})


def _reduced_findings(context: RunContext, config: RunConfig) -> Preflight:
    """What preflight would find of the scaled-down run."""
    found, task = context.findings, context.task
    accumulation = min(found.batch.accumulation, ACCUMULATION)
    size = found.batch.world_size * found.batch.micro * accumulation
    student_ds = copy.copy(found.student_ds)
    student_ds |= {"train_batch_size": size, "gradient_accumulation_steps": accumulation}
    structure = analyze(dense_skeleton(config, task))
    return replace(
        found,
        latency=None,
        batch=replace(found.batch, size=size, accumulation=accumulation),
        structure=structure,
        student_ds=student_ds,
        teaching=plan_teaching(config, structure, teacher_shape(config, task, structure)),
    )


def _write_shallow(source: str, revision: str | None, folder: Path) -> int:
    """Write the configuration of a model's first layers, and nothing else; returns how many there are in all stacks."""
    config = read_model_config(source, revision)
    table = json.loads(config.to_json_string(use_diff=False))
    family = family_for(config.model_type)
    counts = {name: min(LAYERS, getattr(config, name)) for name in (family.sizes[s.count] for s in family.stacks)}
    table |= counts
    if table.get("layer_types"):
        table["layer_types"] = table["layer_types"][: max(counts.values())]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(table), encoding="utf-8")
    return sum(counts.values())
