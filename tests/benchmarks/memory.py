"""Measured peak memory of a rank beside what `dsprune plan` says, and beside both models held whole.

    python -m tests.benchmarks.memory --model FOLDER --ranks 1 2 --batch 4 --length 128

Two steps of a student that starts from random weights and of a teacher like it, from one configuration, with
distillation of logits and layers. On a GPU the peak is torch's own count; on a CPU it is the anonymous memory of the
process above what it has with all libraries loaded, sampled while it runs, with freed blocks given back at once.
"""

from __future__ import annotations

import argparse
import ctypes
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dsprune.config import BatchConfig, DataConfig, DistillConfig, OptimConfig, TaskConfig
from dsprune.distill import default_teacher_layers
from dsprune.measure.tables import render_table
from dsprune.planning.forecast import GIB, Scenario, forecast
from dsprune.tasks.batching import Encoded, Tokens
from dsprune.tasks.kinds.causal import PackedText
from tests.helpers.world import run_world

STEPS = 2
M_MMAP_THRESHOLD = -3


def _anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell anonymous memory (RssAnon)")


class Peak:
    """Samples anonymous memory in a thread while it is entered."""

    def __enter__(self) -> Peak:
        # Blocks of a megabyte go back to the system when they are freed; otherwise the heap keeps them.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
        self.base = self.bytes = _anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, _anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def above(self) -> int:
        """Bytes at the peak."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.bytes - self.base


def _examples(task: str, count: int, length: int, vocabulary: int) -> Encoded:
    ids = torch.randint(3, vocabulary, (count * length,), dtype=torch.int32)
    tokens = Tokens(ids, torch.full((count,), length), 0)
    if task == "lm":
        return PackedText("train", tokens, ids.roll(-1), num_words=1)
    return Encoded("train", tokens, torch.randint(0, 2, (count,)))


def measure(options: argparse.Namespace) -> tuple[float, list[float]]:
    """Peak bytes of this rank, and peaks after each part of the work. Runs on every rank."""
    import dsprune.engine.learning.teacher as teacher_module
    from dsprune.engine.learning.batches import Batches
    from dsprune.engine.learning.student import Student, build_student_engine
    from dsprune.engine.learning.trainer import LayerMatcher, Trainer
    from dsprune.engine.models.load import checkpoint_activations, load_model
    from dsprune.engine.ranks.world import start_world
    from dsprune.engine.zero.config import load_ds_config, plan_batch, student_config, teacher_config
    from dsprune.tasks import build_task

    world = start_world()
    config = AutoConfig.from_pretrained(options.model)
    name = "sst2" if _is_encoder(options.model) else "lm"
    task = build_task(
        TaskConfig(name=name, max_length=options.length, logits_chunk=options.chunk), DataConfig(), seed=0
    )
    plan = plan_batch(BatchConfig(size=options.batch * world.size), world.size)
    ds_config = student_config(load_ds_config(options.student_ds), plan, clip=1.0)
    layers = default_teacher_layers(int(config.num_hidden_layers))
    distill = DistillConfig(match="fixed")
    marks = []
    with Peak() as peak:
        torch.manual_seed(0)
        teacher_module.load_model = partial(load_model, from_scratch=True)
        teacher = teacher_module.Teacher(
            options.model,
            task,
            teacher_config(load_ds_config(options.teacher_ds), world.size),
            layers,
            from_scratch=True,
        )
        marks.append(peak.above)
        model = load_model(options.model, task, ds_config, from_scratch=True)
        if options.checkpointing:
            checkpoint_activations(model)
        student = Student(model, task, distill=distill, teacher=(teacher.width, layers))
        marks.append(peak.above)
        engine = build_student_engine(student, ds_config, lr=1e-5, weight_decay=0.0)
        marks.append(peak.above)
        data = _examples(name, 4 * plan.size, options.length, int(config.vocab_size))
        trainer = Trainer(
            stage="prune",
            engine=engine,
            world=world,
            batches=Batches(data, plan, world, 0),
            optim=OptimConfig(lr=1e-5),
            total_steps=STEPS,
            seed=0,
            teacher=teacher,
            matcher=LayerMatcher("fixed", layers, range(int(config.num_hidden_layers))),
        )
        for step in range(STEPS):
            trainer.step(step)
            marks.append(peak.above)
    return peak.above, marks


def _is_encoder(model: str) -> bool:
    from dsprune.planning.forecast import head_of

    return head_of(AutoConfig.from_pretrained(model)) == "ForSequenceClassification"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with a config.json, whose weights are not read")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--student-ds", default="zero3")
    parser.add_argument("--teacher-ds", default="teacher_zero3")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--timeout", type=float, default=600.0)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    from dsprune.engine.zero.config import load_ds_config

    rows = []
    for ranks in options.ranks:
        found = forecast(
            Scenario(
                student=options.model,
                teacher=options.model,
                student_ds=load_ds_config(options.student_ds),
                teacher_ds=load_ds_config(options.teacher_ds),
                ranks=ranks,
                batch=options.batch,
                length=options.length,
                chunk=options.chunk,
            )
        )
        planned = found.peak(checkpointing=options.checkpointing)
        measured = run_world(measure, ranks, options, timeout=options.timeout)
        worst, marks = max(measured)
        whole = found.whole(checkpointing=options.checkpointing)
        row = [worst, planned, whole]
        rows.append([str(ranks), *(f"{value / GIB:.3f}" for value in row), f"{planned / worst - 1:+.1%}"])
        parts = ("teacher", "student", "engine", *(f"step {step + 1}" for step in range(STEPS)))
        print(f"{ranks} rank(s): " + ", ".join(f"{n} {m / GIB:.3f}" for n, m in zip(parts, marks, strict=True)))
    print(render_table(["ranks", "measured GiB", "planned GiB", "both whole GiB", "plan is off by"], rows))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{found.parameters[0]:,} + {found.parameters[1]:,} parameters, {options.student_ds} and {options.teacher_ds}, "
        f"{options.batch} x {options.length} tokens a rank, {device}"
    )


if __name__ == "__main__":
    main()
