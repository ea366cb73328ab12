"""One training stage on a tiny model, built from the engine's own parts, for tests that compare runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from dsprune.config import BatchConfig, BlocksConfig, DistillConfig, OptimConfig
from dsprune.consolidate import apply_selection
from dsprune.distill import plan_layers
from dsprune.methods import Method, method_class, state_of
from dsprune.methods.mlpruning_blocks import BlockPruning
from dsprune.methods.parts import StartsFromWeights
from dsprune.structure import (
    BlockGating,
    Gating,
    Selection,
    Structure,
    analyze,
    analyze_blocks,
    attach_gates,
    ones,
)
from dsprune.tasks import build_task
from tests.helpers.models import tiny_model
from tests.helpers.plans import block_plan_for, plan_for
from tests.helpers.settings import MethodRow

if TYPE_CHECKING:
    from dsprune.engine.learning.teacher import Teacher
    from dsprune.engine.ranks.world import World
    from dsprune.engine.zero.config import BatchPlan
    from dsprune.tasks.base import Task

BATCH = 8
WIDTH = 32
"""Of all tiny models."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how a training runs, whatever it trains."""

    stage: int = 0
    teacher: str = "teacher"
    accumulation: int = 1
    precision: str = ""
    activation_checkpointing: bool = False
    ds: Mapping[str, Any] | None = None
    """Instead of a configuration that ships: what a file of one's own says."""

    def at(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def plan(self, world: World) -> tuple[BatchPlan, dict[str, Any]]:
        """How a step's batch is cut up, and DeepSpeed's configuration of the student."""
        from dsprune.engine.zero.config import check_ds_config, fill_widths, load_ds_config, plan_batch, student_config

        batch = plan_batch(BatchConfig(size=BATCH, micro=BATCH // world.size // self.accumulation), world.size)
        if self.ds is not None:
            return batch, fill_widths(student_config(check_ds_config(self.ds, "ds.json"), batch, clip=1.0), WIDTH)
        suffix = f"_{self.precision}" if self.precision else ""
        return batch, student_config(load_ds_config(f"zero{self.stage}{suffix}"), batch, clip=1.0)

    def build_teacher(self, model: nn.Module, task: Task, world: World, **parts: Any) -> Teacher:
        """A teacher that is this very model; `parts` is what it shows beside its logits."""
        import dsprune.engine.learning.teacher as teacher_module
        from dsprune.engine.zero.config import load_ds_config, teacher_config

        original = teacher_module.load_model
        teacher_module.load_model = lambda *_, **__: model
        try:
            return teacher_module.Teacher(
                "tiny", task, teacher_config(load_ds_config(self.teacher), world.size), **parts
            )
        finally:
            teacher_module.load_model = original


@dataclass(frozen=True)
class Setup(Setting):
    """A way of running the same training of an encoder."""

    row: MethodRow
    family: str = "bert"
    task: str = "sst2"
    teacher_model: str = ""
    """A model of `tests.helpers.models` that teaches, where that is not one of the family."""
    of: str = "encoder"
    """What the target is a share of."""
    frozen: bool = False
    """Whether the embeddings stay as they were."""
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


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


def pruning(
    name: str, options: dict[str, Any], target: float, model: Any, *, total: int = 6, of: str = "encoder"
) -> tuple[Method[Structure], Gating]:
    """A method that is ready for its first step, and its gates on the model."""
    structure = analyze(model)
    cls = method_class(name)
    method = cls(structure, cls.Options(**options), plan_for(structure, name, target, of=of, total=total))
    if isinstance(method, StartsFromWeights):
        method.begin(model.get_parameter)
    return method, attach_gates(model, structure, empty=method.empty)


def without_some_units(model: Any) -> Any:
    """The compact model without a head (or a group of them) and some output rows."""
    structure = analyze(model)
    gates = ones(structure)
    gates["head"][0, 1] = 0
    gates["ffn_row"][:, 3:9] = 0
    return apply_selection(model, Selection.from_gates(structure, gates, empty="bias"))


def block_pruning(
    options: dict[str, Any], target: float, compact: Any, *, total: int = 6
) -> tuple[BlockPruning, BlockGating]:
    """Step 2 that is ready for its first step, and its gates on the model of step 1."""
    blocks = analyze_blocks(compact, (8, 8))
    method = BlockPruning(blocks, BlocksConfig(shape=(8, 8), **options), block_plan_for(blocks, target, total=total))
    method.begin(compact.get_parameter)
    return method, BlockGating(compact, blocks)


def build_trainer(setup: Setup, *, dropout: bool = False, steps: int | None = None) -> Any:
    """A trainer of the prune stage. Collective; call inside a rank of `run_world`."""
    from dsprune.config import DataConfig, TaskConfig
    from dsprune.engine.learning.batches import Batches
    from dsprune.engine.learning.replica import Replica
    from dsprune.engine.learning.student import Student, build_student_engine
    from dsprune.engine.learning.trainer import LayerMatcher, Trainer
    from dsprune.engine.models.freezing import freeze_embeddings
    from dsprune.engine.ranks.world import start_world

    world = start_world()
    task = build_task(TaskConfig(name=setup.task, stride=16), DataConfig(), seed=0)
    batch, ds_config = setup.plan(world)
    row = setup.row
    if not row.trains:
        return _calibrating(setup, task, world)
    lecturer = without_dropout(tiny_model(setup.teacher_model or setup.family, seed=7))
    distill = DistillConfig(labels=0.3, teacher_layers=row.teacher_layers, **row.distill)
    plan_of_layers = plan_layers(distill, (0, 0), (0,) * lecturer.config.num_hidden_layers)
    teacher = setup.build_teacher(
        lecturer,
        task,
        world,
        layers=plan_of_layers.layers,
        attentions=row.distill.get("attentions", 0) > 0,
    )
    model = tiny_model(setup.family)
    model = model if dropout else without_dropout(model)
    if setup.activation_checkpointing:
        model.activation_checkpointing_enable()
    total = steps or row.steps
    if row.name == "blocks":
        model = without_some_units(model).train()
        method, gating = block_pruning(row.options, row.target, model, total=total)
    else:
        method, gating = pruning(row.name, row.options, row.target, model, total=total, of=setup.of)
    student = Student(
        model,
        task,
        distill=distill,
        teacher=(teacher.width, plan_of_layers.layers),
        gating=gating,
    )
    if setup.frozen:
        freeze_embeddings(model)
    engine = build_student_engine(
        student, ds_config, lr=1e-3, weight_decay=0.01, betas=setup.betas, epsilon=setup.epsilon
    )
    return Trainer(
        stage="prune",
        engine=engine,
        world=world,
        batches=Batches(RandomExamples(setup.task), batch, world, seed=0),
        optim=OptimConfig(lr=1e-3),
        total_steps=total,
        seed=0,
        teacher=teacher,
        matcher=LayerMatcher(
            distill.match,
            plan_of_layers.layers,
            (0, 1),
            partners=plan_of_layers.partners,
            draw=distill.teacher_draw,
        ),
        replica=Replica(method),
    )


def _calibrating(setup: Setup, task: Any, world: World) -> Any:
    """A trainer of a method that trains no weights: nobody teaches, and a step is what the method sees."""
    from dsprune.engine.learning.batches import Batches
    from dsprune.engine.learning.replica import Replica
    from dsprune.engine.learning.student import Student, build_calibrated_engine
    from dsprune.engine.learning.trainer import Trainer

    batch, ds_config = setup.plan(world)
    model, row = without_dropout(tiny_model(setup.family)), setup.row
    method, gating = pruning(row.name, row.options, row.target, model, total=row.steps)
    return Trainer(
        stage="prune",
        engine=build_calibrated_engine(Student(model, task, gating=gating), ds_config),
        world=world,
        batches=Batches(RandomExamples(setup.task), batch, world, seed=0),
        optim=OptimConfig(),
        total_steps=row.steps,
        seed=0,
        replica=Replica(method),
    )


def under_autocast(run: Any, setup: Setting) -> Any:
    """A run with torch's linears in bf16, all else in fp32, and under ZeRO-3 with no weight whole. On every rank."""
    import dsprune.engine.zero.config as ds_config

    load = ds_config.load_ds_config

    def changed(name: str) -> dict[str, Any]:
        config = load(name)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return {**config, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}

    ds_config.load_ds_config = changed
    return run(setup)


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
        "state": {name: value.numpy() for name, value in state_of(trainer.replica.method).items()},
        "fingerprint": trainer.replica.fingerprint(),
    }
