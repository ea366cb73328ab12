"""What a stage is, and what all stages that train have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from dsprune.config import BlocksConfig, OptimConfig, PruneConfig, RecoverConfig, TeacherConfig
from dsprune.engine.learning.replica import Replica
from dsprune.engine.learning.student import Student, build_calibrated_engine, build_student_engine
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.learning.trainer import LayerMatcher, Trainer
from dsprune.engine.models.freezing import freeze_embeddings
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.config import DsConfig
from dsprune.engine.zero.gather import whole
from dsprune.methods import AnyMethod, load_state, state_of
from dsprune.methods.parts import StartsFromWeights
from dsprune.run.context import RunContext
from dsprune.run.exporting import export
from dsprune.run.training.snapshots import Origin
from dsprune.run.training.stage_training import StageTraining
from dsprune.run_folder import STAGES, StageName

__all__ = ["Assembly", "Stage", "TrainedSection", "TrainingStage", "begin"]

TrainedSection = TeacherConfig | PruneConfig | RecoverConfig | BlocksConfig
"""Tables of the recipe that say how a stage trains."""


class Stage(ABC):
    """One stage of a run.

    Args:
        context: of the run.
    """

    name: ClassVar[StageName]

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def check(self) -> None:  # noqa: B027 (most stages have nothing to look at)
        """See what can be known to be wrong now that the data are there, before any stage runs.

        Raises:
            ConfigError: naming the mistake.
        """

    @abstractmethod
    def run(self) -> None:
        """Do all of it, and mark it done. Collective: all ranks must call."""


@dataclass(frozen=True)
class Assembly:
    """Who takes part in a stage that trains.

    Attributes:
        student: with its gates attached, where it learns any.
        origin: of the student's weights.
        method: that chooses the gates; None where none are learned.
        teacher: None where nobody teaches.
        matcher: of layers; None where none are compared.
    """

    student: Student
    origin: Origin
    method: AnyMethod | None = None
    teacher: Teacher | None = None
    matcher: LayerMatcher | None = None


class TrainingStage(Stage):
    """A stage that trains: it assembles a student and who teaches it, trains, and exports what came of it."""

    @property
    @abstractmethod
    def section(self) -> TrainedSection:
        """How weights are trained, and for how long."""

    @abstractmethod
    def assemble(self, ds_config: DsConfig) -> Assembly:
        """Load who takes part. Collective: all ranks must call.

        Args:
            ds_config: filled configuration of the student's engine.

        Raises:
            ConfigError: a model that an earlier stage was to leave is not there.
        """

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.section.duration.steps(self.context.batches.steps_per_epoch)

    @property
    def keeps_best(self) -> bool:
        """Where gates are learned: whether the best checkpoint that reached the target is exported, not the last."""
        return False

    def nothing_to_do(self) -> str | None:
        """Why nothing is to be trained, for people; None where something is."""
        return None

    def before_training(self, training: StageTraining) -> None:
        """Look at who was assembled, before the first step. Collective: all ranks must call."""

    def prepare(self, title: str | None = None) -> StageTraining:
        """Student, method and teacher, their engines and the trainer. Collective: all ranks must call.

        Args:
            title: what the stage is called in messages; by default its name.

        Raises:
            ConfigError: DeepSpeed refuses a configuration, or an earlier stage's model is not there.
        """
        context, section = self.context, self.section
        ds_config = context.student_ds(section)
        assembly = self.assemble(ds_config)
        trainer = Trainer(
            stage=title or self.name,
            engine=_engine(assembly, ds_config, section),
            world=context.world,
            batches=context.batches,
            optim=section,
            total_steps=self.total_steps,
            seed=context.config.seed,
            teacher=assembly.teacher,
            matcher=assembly.matcher,
            replica=Replica(assembly.method) if assembly.method is not None else None,
            stop=context.stop,
        )
        return StageTraining(context, self.name, trainer, assembly.origin, keeps_best=self.keeps_best)

    def run(self) -> None:
        reason = self.nothing_to_do()
        if reason is not None:
            self.context.journal.say(f"{self.name}: {reason}")
            return
        training = self.prepare()
        self.before_training(training)
        trained = training.run()
        facts: dict[str, Any] = {"landing": training.settle(trained)} if training.trainer.replica else {}
        training.release()
        if STAGES[self.name].model is not None:
            model = self.context.folder.model_of(self.name)
            export(trained.checkpoint, model, self.context.world, self.context.stop)
            facts |= {"model": str(model)}
        self.context.mark_done(self.name, checkpoint=str(trained.checkpoint), metrics=trained.metrics, **facts)


def begin(method: AnyMethod, model: PreTrainedModel, world: World) -> None:
    """Let a method start from the weights, where it does, the same bits on every rank. Collective."""
    if isinstance(method, StartsFromWeights):
        method.begin(lambda name: whole(model, name))
        load_state(method, world.broadcast(state_of(method)))


def _engine(assembly: Assembly, ds_config: DsConfig, optim: OptimConfig) -> Any:
    """The student as an engine that trains it as the stage asks, or that leaves it as it is. Collective."""
    student = assembly.student
    if assembly.method is not None and not assembly.method.trains_weights:
        return build_calibrated_engine(student, ds_config)
    if optim.freeze_embeddings:
        freeze_embeddings(student.model)
    return build_student_engine(
        student,
        ds_config,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        epsilon=optim.epsilon,
    )
