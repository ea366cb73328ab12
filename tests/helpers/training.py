"""One training stage on a tiny model, built from the engine's own parts, for tests that compare runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsprune.config import BatchConfig, BlocksConfig, DistillConfig, OptimConfig
from dsprune.consolidate import apply_selection
from dsprune.methods import Plan, method_class
from dsprune.methods.mlpruning_blocks import BlockPruning
from dsprune.structure import (
    BlockGating,
    Selection,
    analyze,
    analyze_blocks,
    attach_gates,
    block_magnitudes,
    ones,
    unit_magnitudes,
)
from dsprune.tasks import build_task
from tests.helpers.models import tiny_model
from tests.helpers.settings import MethodRow

BATCH = 8


@dataclass(frozen=True)
class Setup:
    """A way of running the same training."""

    row: MethodRow
    stage: int = 0
    teacher: str = "teacher"
    accumulation: int = 1
    precision: str = ""
    family: str = "bert"
    task: str = "sst2"
    activation_checkpointing: bool = False

    def at(self, **changes: Any) -> Setup:
        return replace(self, **changes)


class RandomExamples:
    """Random token sequences of several lengths with the labels of a task, as `Encoded` examples."""

    def __init__(self, task: str = "sst2", count: int = 64) -> None:
        generator = torch.Generator().manual_seed(5)
        self.lengths = torch.randint(4, 12, (count,), generator=generator)
        self.ids = torch.randint(3, 50, (count, 12), generator=generator)
        self.labels = torch.randint(0, 2, (count,), generator=generator)
        self.targets = torch.ones(count, dtype=torch.int64)
        if task != "sst2":
            self.labels = torch.randint(0, 9 if task == "conll2003" else 4, (count, 12), generator=generator)
            self.labels[torch.arange(12) >= self.lengths[:, None]] = -100
        if task == "conll2003":
            self.labels[:, ::3] = -100  # word pieces after the first; unequally many labels in an example
            self.targets = (self.labels != -100).sum(1)
        elif task == "squad":  # one start and one end in every example
            self.labels.clamp_(max=0)
            self.labels[:, 1], self.labels[:, 3] = 1, 2

    def __len__(self) -> int:
        return len(self.lengths)

    def in_epoch(self, epoch: int) -> RandomExamples:
        return self

    def collate(self, indices: Any) -> dict[str, Tensor]:
        chosen = torch.as_tensor(indices)
        width = int(self.lengths[chosen].max())
        mask = (torch.arange(width) < self.lengths[chosen][:, None]).long()
        return {
            "input_ids": self.ids[chosen][:, :width] * mask,
            "attention_mask": mask,
            "labels": self.labels[chosen] if self.labels.dim() == 1 else self.labels[chosen][:, :width],
        }


def without_dropout(model: nn.Module) -> nn.Module:
    """Dropout depends on the rank, and these tests compare worlds of different size."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model


def pruning(row: MethodRow, plan: Plan, model: Any) -> Any:
    structure = analyze(model)
    cls = method_class(row.name)
    method = cls(structure, cls.Options(**row.options), plan)
    if method.wants_magnitudes:
        method.begin(unit_magnitudes(structure, model.get_parameter))
    return method, attach_gates(model, structure, empty=method.empty), model


def _block_pruning(row: MethodRow, plan: Plan, model: Any) -> Any:
    """Blocks of a compact model without a head and some output rows."""
    structure = analyze(model)
    gates = ones(structure)
    gates["head"][0, 1] = 0
    gates["ffn_row"][:, 3:9] = 0
    compact = apply_selection(model, Selection.from_gates(structure, gates, empty="bias"))
    compact.train()
    blocks = analyze_blocks(compact, (8, 8))
    method = BlockPruning(blocks, BlocksConfig(shape=(8, 8), **row.options), plan)
    method.begin(block_magnitudes(blocks, compact.get_parameter))
    return method, BlockGating(compact, blocks), compact


def build_trainer(setup: Setup, *, dropout: bool = False, steps: int | None = None) -> Any:
    """A trainer of the prune stage. Collective; call inside a rank of `run_world`."""
    import dsprune.engine.teacher as teacher_module
    from dsprune.config import DataConfig, TaskConfig
    from dsprune.engine.batches import Batches
    from dsprune.engine.ds_config import load_ds_config, plan_batch, student_config, teacher_config
    from dsprune.engine.replica import Replica
    from dsprune.engine.student import Student, build_student_engine
    from dsprune.engine.trainer import LayerMatcher, Trainer
    from dsprune.engine.world import start_world

    world = start_world()
    task = build_task(TaskConfig(name=setup.task, stride=16), DataConfig(), seed=0)
    batch = plan_batch(BatchConfig(size=BATCH, micro=BATCH // world.size // setup.accumulation), world.size)
    suffix = f"_{setup.precision}" if setup.precision else ""
    ds_config = student_config(load_ds_config(f"zero{setup.stage}{suffix}"), batch, clip=1.0)
    original = teacher_module.load_model
    teacher_module.load_model = lambda *_, **__: without_dropout(tiny_model(setup.family, seed=7))
    try:
        teacher = teacher_module.Teacher(
            "tiny",
            task,
            teacher_config(load_ds_config(setup.teacher), world.size),
            layers=setup.row.teacher_layers,
            attentions=setup.row.distill.get("attentions", 0) > 0,
        )
    finally:
        teacher_module.load_model = original
    model = tiny_model(setup.family)
    model = model if dropout else without_dropout(model)
    if setup.activation_checkpointing:
        model.activation_checkpointing_enable()
    row = setup.row
    total = steps or row.steps
    plan = Plan(row.target, "encoder", total, 4, 0)
    method, gating, model = _block_pruning(row, plan, model) if row.name == "blocks" else pruning(row, plan, model)
    student = Student(
        model,
        task,
        distill=DistillConfig(labels=0.3, **row.distill),
        teacher=(32, row.teacher_layers),
        gating=gating,
    )
    engine = build_student_engine(student, ds_config, lr=1e-3, weight_decay=0.01)
    return Trainer(
        stage="prune",
        engine=engine,
        world=world,
        batches=Batches(RandomExamples(setup.task), batch, world, seed=0),
        optim=OptimConfig(lr=1e-3),
        total_steps=total,
        seed=0,
        teacher=teacher,
        matcher=LayerMatcher(row.distill["match"], row.teacher_layers, (0, 1)),
        replica=Replica(method),
    )


def spoiled(teach: Any, factor: float) -> Any:
    """A teacher's `teach` whose logits are multiplied by something."""

    def teach_badly(*args: Any) -> Any:
        logits, *rest = teach(*args)
        return logits * factor, *rest

    return teach_badly


def trajectory(setup: Setup) -> dict[str, Any]:
    """Losses of every step and the method's final state. Runs on every rank."""
    trainer = build_trainer(setup)
    losses = [trainer.step(step).losses for step in range(trainer.total_steps)]
    trainer.replica.check_equal(trainer.world, trainer.total_steps)
    return {
        "losses": losses,
        "state": {name: value.numpy() for name, value in trainer.replica.method.state_dict().items()},
        "fingerprint": trainer.replica.fingerprint(),
    }
