"""Everything that can be known to be wrong before training starts, found before training starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsprune.arch import family_for
from dsprune.config import RunConfig
from dsprune.consolidate import factor_embedding, is_stock
from dsprune.distill import LayerPlan
from dsprune.engine.models.factoring import check_rank
from dsprune.engine.models.load import load_tokenizer
from dsprune.engine.models.skeleton import skeleton
from dsprune.engine.models.source_check import plan_loading
from dsprune.engine.zero.config import (
    BatchPlan,
    DsConfig,
    fill_widths,
    load_ds_config,
    plan_batch,
    student_config,
    teacher_config,
)
from dsprune.engine.zero.torch_autocast import check_autocast
from dsprune.errors import ArchitectureError, ConfigError, OutputError
from dsprune.methods import Evidence, Method, Plan, method_class
from dsprune.methods.parts import gates_from
from dsprune.methods.size_constraints import aimed
from dsprune.pretrained import resolve_source
from dsprune.run.preflight.teacher_fit import check_positions, check_start, check_teacher
from dsprune.run.preflight.teaching import plan_teaching, teacher_shape
from dsprune.run_folder import RunFolder
from dsprune.structure import Budget, Empty, Selection, Structure, analyze, block_grid, budget_for, shape_gates
from dsprune.structure.latency import LatencyCost, LatencyTable, speedup_budget
from dsprune.tasks import Task, build_task

__all__ = ["Preflight", "check_output", "dense_skeleton", "preflight"]

OF_HEAD = ("tie_word_embeddings", "own_head")
"""Keys of a configuration that say whether the head is the word embedding."""


@dataclass(frozen=True)
class Preflight:
    """What was found good."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    batch: BatchPlan
    structure: Structure
    student_ds: DsConfig
    teacher_ds: DsConfig
    teaching: LayerPlan
    """Teacher layers that teach, and the student layers in their place."""
    vocab_size: int
    budget: Budget
    """What pruning is held to: what was asked for, or what the shape implies that was given instead."""
    trains_weights: bool
    """Whether the pruning stage trains weights, or only looks at those of the fine-tuned dense model."""
    evidence: Evidence
    """What the method wants to see of a step."""
    latency: LatencyTable | None = None
    """Milliseconds that a speedup is counted in, once the session has them."""


def dense_skeleton(config: RunConfig, task: Task) -> PreTrainedModel:
    """The skeleton of what is pruned: its word embedding factored, where that is asked for.

    Raises:
        ConfigError: the source cannot be read, or the rank saves nothing.
        ArchitectureError: as of `skeleton`.
    """
    model = skeleton(config.model.name, task, config.model.revision)
    _factor(config, model)
    return model


def _factor(config: RunConfig, model: PreTrainedModel) -> None:
    if config.prune.embedding_rank:
        check_rank(model, config.prune.embedding_rank)
        factor_embedding(model, family_for(model.config.model_type).as_dict(), config.prune.embedding_rank)


def check_output(folder: Path) -> None:
    """See that a run folder can be written.

    Raises:
        OutputError: it cannot, or is a file.
    """
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"output '{folder}': {nearest} is a file: choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(
            f"output '{folder}': {nearest} cannot be written: choose another folder or mend its permissions"
        )


def _check_weights(config: RunConfig, task: Task) -> dict[str, Any]:
    """What is to be loaded must hold the model that the task needs; weights that are not here yet are seen later.

    Returns:
        What the configuration of the student has to say of its head, which its files may know better.
    """
    model, own_teacher = config.model, RunFolder(config.output).model_of("teacher")
    student = None
    teaches = "teacher" in config.stages and config.teacher.path is None
    if (teaches or ("prune" in config.stages and config.prune.start == "pretrained")) and not model.from_scratch:
        student = plan_loading(
            resolve_source(model.name), task, revision=model.revision, fresh_head=True, download=False
        )
    if config.teacher.path is not None:
        teacher = plan_loading(resolve_source(config.teacher.path), task, download=False)
        student = teacher if config.prune.start == "teacher" else student
    elif student is None and (own_teacher / "config.json").is_file():
        student = plan_loading(str(own_teacher), task)
    if student is None:
        return {}
    return {key: value for key in OF_HEAD if (value := getattr(student.config, key, None)) is not None}


def _check_text(config: RunConfig, task: Task, vocab_size: int) -> None:
    """Settings that only text tasks read, or that they need."""
    top_k = config.distill.top_k
    if top_k is not None and task.problem != "text":
        raise ConfigError(f"distill.top_k: for logits over a vocabulary, which task '{task.name}' has not")
    if top_k is not None and top_k >= vocab_size:
        raise ConfigError(f"distill.top_k = {top_k}: the model has {vocab_size} tokens; give fewer, or leave it out")
    if config.model.from_scratch and config.prune.start == "pretrained" and "prune" in config.stages:
        raise ConfigError(
            "model.from_scratch = true: there are no pretrained weights for the student to start from; set "
            "prune.start = 'teacher'"
        )


def _check_attentions(config: RunConfig, structure: Structure) -> None:
    """Attention maps are compared over one sequence of tokens."""
    if config.distill.attentions > 0 and len(structure.stacks) > 1:
        raise ConfigError(
            f"distill.attentions = {config.distill.attentions:g}: the layers of an encoder-decoder "
            f"('{structure.family.name}') attend over different sequences, and their maps are not distilled: set it to "
            "0; distill.layers compares hidden states"
        )


def _check_padding(model: PreTrainedModel, task: Task) -> None:
    """A decoder finds the last token of a sequence, which it classifies, by the padding behind it."""
    reads_last = family_for(model.config.model_type).every_token and task.head == "ForSequenceClassification"
    if reads_last and model.config.pad_token_id is None:
        raise ConfigError(
            f"model: a {type(model).__name__} reads the last token before the padding, and its config.json says no "
            "pad_token_id: set it there"
        )


def _check_blocks(config: RunConfig, structure: Structure) -> None:
    """Blocks must fit into the matrices of the dense model, to begin with."""
    if config.blocks.duration.count == 0:
        return
    if structure.family.blocks_refusal is not None:
        raise ArchitectureError(f"blocks.duration: {structure.family.blocks_refusal}")
    for param in structure.params.values():
        if param.part != "encoder" or len(param.shape) != 2:
            continue
        try:
            block_grid(param.shape, config.blocks.shape)
        except ConfigError as error:
            raise ConfigError(f"blocks.shape: {param.name}: {error}") from error


def _check_untrained(config: RunConfig) -> None:
    """A method that trains no weights chooses among the units of a model that knows the task already."""
    if method_class(config.method.name).trains_weights or config.prune.start == "teacher":
        return
    raise ConfigError(
        f"prune.start = '{config.prune.start}': method '{config.method.name}' trains no weights, and what it chooses "
        "from is the fine-tuned dense model: set prune.start = 'teacher'"
    )


def _check_stock(config: RunConfig, model: PreTrainedModel, method: Method[Structure]) -> None:
    """A shape that is given is given for a stock model."""
    gates = shape_gates(method.structure, config.shape.sizes)
    if gates and not is_stock(model, Selection.from_gates(method.structure, gates, empty=method.empty)):
        sizes = ", ".join(f"{name} = {size}" for name, size in config.shape.sizes.items())
        raise ConfigError(f"shape: {type(model).__name__} has no stock form with {sizes}")


def _asked(config: RunConfig, structure: Structure, empty: Empty, table: LatencyTable | None) -> Budget:
    """What the recipe asks of pruning."""
    prune = config.prune
    if prune.speedup is not None and table is not None:
        return speedup_budget(LatencyCost(structure, table, empty=empty), prune.speedup)
    # Nothing is known to be out of a speedup's reach before there is a table.
    target = prune.target if prune.speedup is None else 0.0
    return budget_for(structure, target, of=prune.target_of, empty=empty, length=config.task.max_length)


def build_method(
    config: RunConfig,
    structure: Structure,
    *,
    total_steps: int,
    steps_per_epoch: int,
    table: LatencyTable | None = None,
) -> Method[Structure]:
    """The configured method on this structure.

    Args:
        config: of the run.
        structure: of the dense model.
        total_steps: of the pruning stage.
        steps_per_epoch: of it.
        table: that a speedup is counted with; without one it is asked for nothing, and only its options are looked at.

    Raises:
        ConfigError: a target or a shape out of reach, or options that do not fit the length of the stage.
    """
    cls = method_class(config.method.name)
    prune = config.prune
    plan = Plan(
        budget=aimed(
            _asked(config, structure, cls.empty, table),
            structure,
            config.shape,
            is_set="target" in prune.model_fields_set,
        ),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        seed=config.seed,
        shape=config.shape,
    )
    return cls(structure, config.method.options, plan)


def _student_ds(config: RunConfig, read: DsConfig, batch: BatchPlan) -> DsConfig:
    """The student's DeepSpeed configuration at the first stage that trains; the others differ in their clipping alone.

    Raises:
        ConfigError: it contradicts the recipe, at any stage of this launch.
    """
    trained = [stage for stage in ("teacher", "prune", "recover", "blocks") if stage in config.stages] or ["prune"]
    filled = [student_config(read, batch, clip=getattr(config, stage).clip) for stage in trained]
    return filled[0]


def _check_configuration(
    config: RunConfig, world_size: int
) -> tuple[Task, PreTrainedTokenizerBase, BatchPlan, DsConfig, DsConfig]:
    """What is known of a run before its model is looked at: task, tokenizer, batch, and both DeepSpeed configurations.

    Raises:
        ConfigError: with all mistakes together.
    """
    mistakes: list[str] = []

    def collect(check: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return check(*args, **kwargs)
        except ConfigError as error:
            mistakes.extend(error.mistakes)
            return None

    batch = collect(plan_batch, config.batch, world_size)
    student = collect(load_ds_config, config.deepspeed.student)
    teacher = collect(load_ds_config, config.deepspeed.teacher)
    for where, found in (("deepspeed.student", student), ("deepspeed.teacher", teacher)):
        if found is not None:
            collect(check_autocast, where, found)
    student_ds = collect(_student_ds, config, student, batch) if student is not None and batch else None
    teacher_ds = collect(teacher_config, teacher, world_size) if teacher is not None else None
    task = collect(build_task, config.task, config.data, seed=config.seed)
    tokenizer = collect(load_tokenizer, config.model.name, config.model.revision)
    collect(_check_untrained, config)
    if mistakes:
        raise ConfigError(*mistakes)
    assert student_ds is not None
    assert teacher_ds is not None
    return task, tokenizer, batch, student_ds, teacher_ds


def preflight(config: RunConfig, world_size: int) -> Preflight:
    """Check the whole configuration against model, task, DeepSpeed and machine. No weights, no collective.

    Of the data nothing is read but the training examples of a task that finds its labels in them.

    Raises:
        ConfigError: with all mistakes of configuration together; other errors as found.
    """
    task, tokenizer, batch, student_ds, teacher_ds = _check_configuration(config, world_size)
    check_output(Path(config.output))
    model = skeleton(config.model.name, task, config.model.revision)
    analyze(model)
    check_positions("model", config, model.config)
    vocab_size = int(model.config.vocab_size)
    _check_padding(model, task)
    check_teacher(config, task, vocab_size, tokenizer)
    outputs = _check_weights(config, task)
    model = skeleton(config.model.name, task, config.model.revision, outputs=outputs)
    check_start(config, task, model, outputs)
    _factor(config, model)
    structure = analyze(model)
    student_ds, teacher_ds = (fill_widths(ds, int(model.config.hidden_size)) for ds in (student_ds, teacher_ds))
    _check_text(config, task, vocab_size)
    _check_attentions(config, structure)
    method = build_method(config, structure, total_steps=0, steps_per_epoch=0)
    teaching = plan_teaching(config, structure, teacher_shape(config, task, structure), method.kinds)
    _check_stock(config, model, method)
    _check_blocks(config, structure)
    return Preflight(
        task,
        tokenizer,
        batch,
        structure,
        student_ds,
        teacher_ds,
        teaching,
        vocab_size,
        method.budget,
        method.trains_weights,
        method.evidence(gates_from(method)),
    )
