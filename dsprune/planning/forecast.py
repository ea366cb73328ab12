"""`dsprune plan`: memory per rank of student, teacher, activations and distillation, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dsprune.config import DistillConfig
from dsprune.distill import LayerPlan, plan_layers
from dsprune.engine.models.load import AUTO_CLASSES, from_config
from dsprune.engine.zero.config import (
    check_student,
    check_teacher_stage,
    dtype_of,
    fill_widths,
    load_ds_config,
    precision,
    zero_stage,
)
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.files import first_line
from dsprune.measure.tables import render_table
from dsprune.planning.activations import Build, MicroStep, TeacherPass, stacks_of, trace_step, trace_teacher
from dsprune.planning.states import States, engine_states
from dsprune.pretrained import read_model_config

__all__ = [
    "GIB",
    "STATE_HEADERS",
    "Forecast",
    "Scenario",
    "describe_forecast",
    "forecast",
    "head_of",
    "plan_model",
    "state_cells",
]

GIB = 2**30
STATE_HEADERS = ["parameters", "gradients", "fp32 masters", "optimizer", "bucket", "GiB per rank", "on host", "on NVMe"]
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme")
"""Shipped configurations that the overview goes through, in the precision of the student's."""


@dataclass(frozen=True)
class Scenario:
    """What is to be trained, and how.

    Attributes:
        student: source of the model.
        teacher: source of the teacher.
        student_ds: checked DeepSpeed configuration of the student's engine.
        teacher_ds: checked DeepSpeed configuration of the teacher's engine.
        ranks: number of ranks.
        batch: sequences of a micro-batch.
        length: tokens of each.
        chunk: tokens whose logits exist at a time.
        teacher_layers: that teach, as `distill.teacher_layers`; None for the default.
    """

    student: str
    teacher: str
    student_ds: Mapping[str, Any]
    teacher_ds: Mapping[str, Any]
    ranks: int
    batch: int
    length: int
    chunk: int
    teacher_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Forecast:
    """Bytes on one rank.

    Attributes:
        parameters: of student and teacher, elements.
        student: its states.
        teacher: its states.
        plan: which layers of the teacher teach which of the student.
        teaching: the teacher's forward pass.
        activations: the student's pass with the task's loss alone; the second number with checkpointing.
        distilling: what distillation adds to `activations`; the second number with checkpointing.
    """

    parameters: tuple[int, int]
    student: States
    teacher: States
    plan: LayerPlan
    teaching: float
    activations: tuple[float, float]
    distilling: tuple[float, float]

    def peak(self, *, checkpointing: bool) -> float:
        """The largest of the three phases of a step: the teacher answers, the student learns, the weights move."""
        here = self.student.resident + self.teacher.parameters
        index = int(checkpointing)
        answering = self.teacher.gathered + self.teaching
        learning = self.student.gathered + self.activations[index] + self.distilling[index] + self.student.reduction
        return here + max(answering, learning, self.student.step)

    def whole(self, *, checkpointing: bool) -> float:
        """Both models held whole by every rank, in fp32: weights, gradients and moments, the teacher's weights."""
        index = int(checkpointing)
        student, teacher = self.parameters
        return 16 * student + 4 * teacher + self.activations[index] + self.distilling[index]


def head_of(config: PretrainedConfig) -> str:
    """The head that the configuration names, or the one that its kind of model is trained with."""
    for head in AUTO_CLASSES:
        if any(name.endswith(head) for name in config.architectures or []):
            return head
    if config.is_encoder_decoder:
        return "ForConditionalGeneration"
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "ForSequenceClassification" if encoder else "ForCausalLM"


def _builder(source: str) -> Build:
    config = read_model_config(source)

    def build() -> PreTrainedModel:
        try:
            return from_config(head_of(config), config)
        except ValueError as error:
            raise ArchitectureError(f"model '{source}': {first_line(error)}") from error

    return build


@dataclass(frozen=True)
class _Extent:
    """Elements of each parameter of a model, its width, and for each of its layers the stack that it stands in."""

    elements: list[int]
    width: int
    stacks: tuple[int, ...]


def _extent(build: Build) -> _Extent:
    with torch.device("meta"):
        model = build()
    elements = [param.numel() for param in model.parameters()]
    return _Extent(elements, int(model.config.hidden_size), stacks_of(model))


def forecast(scenario: Scenario) -> Forecast:
    """Memory of a training step with a teacher. Nothing but configurations is read.

    Raises:
        ConfigError: a source that cannot be read, or layers that the teacher has not.
        ArchitectureError: a model that cannot be trained so.
    """
    student, teacher = _builder(scenario.student), _builder(scenario.teacher)
    ours, theirs = _extent(student), _extent(teacher)
    micro = MicroStep(scenario.batch, scenario.length, dtype_of(scenario.student_ds), scenario.chunk)
    plan = plan_layers(DistillConfig(teacher_layers=scenario.teacher_layers), ours.stacks, theirs.stacks)
    lecture = TeacherPass(theirs.width, plan.partners, gathers_head=zero_stage(scenario.teacher_ds) == 3)
    pairs = []
    for checkpointing in (False, True):
        step = MicroStep(**{**vars(micro), "checkpointing": checkpointing})
        alone, taught = trace_step(student, step, None), trace_step(student, step, lecture)
        pairs.append((float(alone), float(taught - alone)))
    (plain, adds), (plain_again, adds_again) = pairs
    asked = MicroStep(scenario.batch, scenario.length, dtype_of(scenario.teacher_ds), scenario.chunk)
    return Forecast(
        parameters=(sum(ours.elements), sum(theirs.elements)),
        student=engine_states(ours.elements, scenario.student_ds, scenario.ranks, trained=True),
        teacher=engine_states(theirs.elements, scenario.teacher_ds, scenario.ranks, trained=False),
        plan=plan,
        teaching=float(trace_teacher(teacher, asked, plan.layers)),
        activations=(plain, plain_again),
        distilling=(adds, adds_again),
    )


def state_cells(states: States) -> list[str]:
    """A row of states under `STATE_HEADERS`."""
    parts = (states.parameters, states.gradients, states.masters, states.optimizer, states.bucket)
    return [f"{value / GIB:.3f}" for value in (*parts, states.resident, states.host, states.disk)]


def _overview(scenario: Scenario) -> str:
    """The student's states at every ZeRO stage, in the precision of its configuration."""
    sizes = _extent(_builder(scenario.student)).elements
    kind = precision(scenario.student_ds)
    rows = []
    for name in STAGES:
        ds_config = load_ds_config(name)
        if kind != "fp32":
            if zero_stage(ds_config) == 0:
                continue  # refused, see `check_student`
            ds_config |= {kind: {"enabled": True}}
        rows.append([name, *state_cells(engine_states(sizes, ds_config, scenario.ranks, trained=True))])
    return render_table(["student", *STATE_HEADERS], rows)


def _engines(scenario: Scenario, found: Forecast) -> str:
    rows = [
        [name, f"ZeRO {zero_stage(ds_config)}", precision(ds_config), *state_cells(states)]
        for name, ds_config, states in (
            ("student", scenario.student_ds, found.student),
            ("teacher", scenario.teacher_ds, found.teacher),
        )
    ]
    return render_table(["engine", "stage", "dtype", *STATE_HEADERS], rows)


def _step(found: Forecast) -> str:
    rows = []
    for name, index in (("all activations", 0), ("checkpointing", 1)):
        again = bool(index)
        cells = (
            found.activations[index],
            found.distilling[index],
            found.student.gathered,
            found.student.reduction,
            found.teacher.gathered + found.teaching,
            found.student.step,
            found.peak(checkpointing=again),
            found.whole(checkpointing=again),
        )
        rows.append([name, *(f"{cell / GIB:.3f}" for cell in cells)])
    headers = [
        "GiB",
        "activations",
        "distillation",
        "gathered",
        "reduction",
        "teacher's pass",
        "step",
        "peak",
        "both whole, fp32",
    ]
    return render_table(headers, rows)


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def describe_forecast(scenario: Scenario) -> str:
    """The whole forecast as text."""
    found = forecast(scenario)
    student, teacher = found.parameters
    sections = {
        "models": f"student {scenario.student}: {student:,} parameters\n"
        f"teacher {scenario.teacher}: {teacher:,} parameters\n"
        f"layers {_listed(found.plan.layers)} of the teacher teach, beside layers {_listed(found.plan.partners)} of "
        "the student",
        f"the student's states on {scenario.ranks} rank(s), stage by stage": _overview(scenario),
        "both engines as configured": _engines(scenario, found),
        f"a step of {scenario.batch} x {scenario.length} tokens a rank": _step(found),
    }
    note = (
        "peak = states of both + the largest of: the teacher's pass; activations + distillation + gathered weights + "
        "reduction; the step.\n"
        "The framework's own memory (CUDA context, NCCL buffers, libraries) and fragmentation come on top."
    )
    body = "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections.items())
    return f"{body}\n{note}"


def plan_model(
    student: str,
    *,
    teacher: str | None,
    student_ds: str,
    teacher_ds: str,
    ranks: int,
    batch: int,
    length: int,
    chunk: int,
    teacher_layers: Sequence[int] | None = None,
) -> str:
    """What `dsprune plan` prints.

    Raises:
        ConfigError: with all mistakes of the command line together.
        ArchitectureError: a model that cannot be trained so.
    """
    mistakes: list[str] = []
    wrong = {"--ranks": ranks, "--batch": batch, "--length": length, "--chunk": chunk}
    mistakes += [f"{name} {value}: at least 1" for name, value in wrong.items() if value < 1]
    found = []
    for name in (student_ds, teacher_ds):
        try:
            found.append(load_ds_config(name))
        except ConfigError as error:
            mistakes += error.mistakes
    if len(found) == 2:
        check_student(found[0])
        check_teacher_stage(found[1])
    if mistakes:
        raise ConfigError(*mistakes)
    widths = (int(read_model_config(source).hidden_size) for source in (student, teacher or student))
    student_filled, teacher_filled = (fill_widths(ds, width) for ds, width in zip(found, widths, strict=True))
    return describe_forecast(
        Scenario(
            student,
            teacher or student,
            student_filled,
            teacher_filled,
            ranks,
            batch,
            length,
            chunk,
            None if teacher_layers is None else tuple(teacher_layers),
        )
    )
