"""The pruning stage: the student learns which of its units to lose, the teacher distilling."""

from __future__ import annotations

from transformers import PreTrainedModel

from dsprune.config import PruneConfig
from dsprune.engine.learning.student import Student
from dsprune.engine.models.factoring import factor_word_embedding
from dsprune.engine.zero.config import DsConfig
from dsprune.engine.zero.gather import whole
from dsprune.errors import ConfigError
from dsprune.methods import Method
from dsprune.run.preflight import build_method
from dsprune.run.stages.base import Assembly, TrainingStage
from dsprune.run.stages.distilling import load_dense_teacher, match_planned
from dsprune.run.training.given_teacher import look_at_given_teacher
from dsprune.run.training.snapshots import Origin
from dsprune.run.training.stage_training import StageTraining
from dsprune.structure import attach_gates, unit_magnitudes

__all__ = ["PruneStage"]


class PruneStage(TrainingStage):
    """Learns gates and weights of the dense model together."""

    name = "prune"

    @property
    def section(self) -> PruneConfig:
        return self.context.config.prune

    @property
    def keeps_best(self) -> bool:
        return self.section.keep_best

    def check(self) -> None:
        # Now that an epoch has a length, see that the method's phases fit, before the teacher trains.
        self._method()

    def assemble(self, ds_config: DsConfig) -> Assembly:
        context, structure = self.context, self.context.findings.structure
        method = self._method()
        teacher = load_dense_teacher(context)
        source = context.teacher_source if self.section.start == "teacher" else None
        context.seed("head")
        model = context.models.student(source, ds_config)
        self._check_head(model)
        if self.section.embedding_rank:
            factor_word_embedding(model, self.section.embedding_rank)
        student = Student(
            model,
            context.task,
            distill=context.config.distill,
            teacher=(teacher.width, context.findings.teaching.layers),
            gating=attach_gates(model, structure, empty=method.empty),
        )
        if method.wants_magnitudes:
            method.begin(context.world.broadcast(unit_magnitudes(structure, lambda name: whole(model, name))))
        matcher = match_planned(context, teacher, tuple(range(structure.sizes.num_layers)))
        return Assembly(student, Origin(dense=source), method, teacher, matcher)

    def before_training(self, training: StageTraining) -> None:
        assert training.trainer.teacher is not None
        look_at_given_teacher(self.context, training.trainer.teacher)

    def _method(self) -> Method:
        context = self.context
        return build_method(
            context.config,
            context.findings.structure,
            total_steps=self.total_steps,
            steps_per_epoch=context.batches.steps_per_epoch,
            table=context.findings.latency,
        )

    def _check_head(self, model: PreTrainedModel) -> None:
        """See that the head is what preflight took it for, which it cannot know of weights that are yet to come."""
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        if self.context.findings.structure.tied and head is not None and head.weight is not words.weight:
            raise ConfigError(
                f"model '{self.context.config.model.name}': its files, which are here only now, hold a head of its "
                "own: start the same command again"
            )
