"""The pruning stage: the student learns which of its units to lose, the teacher distilling."""

from __future__ import annotations

from transformers import PreTrainedModel

from dsprune.config import PruneConfig
from dsprune.engine.learning.student import Student
from dsprune.engine.models.factoring import factor_word_embedding
from dsprune.engine.zero.config import DsConfig
from dsprune.errors import ConfigError
from dsprune.methods import Method
from dsprune.run.preflight import build_method
from dsprune.run.stages.base import Assembly, TrainingStage, begin
from dsprune.run.stages.distilling import load_dense_teacher, match_planned
from dsprune.run.training.given_teacher import look_at_given_teacher
from dsprune.run.training.scoring import answering
from dsprune.run.training.snapshots import Origin
from dsprune.run.training.stage_training import StageTraining
from dsprune.structure import Structure, attach_gates

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
        method = self._method()
        return self._trained(method, ds_config) if method.trains_weights else self._calibrated(method, ds_config)

    def _trained(self, method: Method[Structure], ds_config: DsConfig) -> Assembly:
        """A student that learns from the fine-tuned dense model."""
        context, findings = self.context, self.context.findings
        teacher = load_dense_teacher(context)
        source = context.teacher_source if self.section.start == "teacher" else None
        model = self._model(source, ds_config)
        student = Student(
            model,
            context.task,
            distill=context.config.distill,
            teacher=(teacher.width, findings.teaching.layers),
            gating=attach_gates(model, findings.structure, empty=method.empty),
        )
        begin(method, model, context.world)
        matcher = match_planned(context, teacher, tuple(range(findings.structure.sizes.num_layers)))
        return Assembly(student, Origin(dense=source), method, teacher, matcher)

    def _calibrated(self, method: Method[Structure], ds_config: DsConfig) -> Assembly:
        """The fine-tuned dense model itself, whose weights stay as they are, and nobody who teaches it."""
        context, source = self.context, self.context.teacher_source
        model = self._model(source, ds_config)
        gating = attach_gates(model, context.findings.structure, empty=method.empty)
        begin(method, model, context.world)
        return Assembly(Student(model, context.task, gating=gating), Origin(dense=source), method)

    def _model(self, source: str | None, ds_config: DsConfig) -> PreTrainedModel:
        self.context.seed("head")
        model = self.context.models.student(source, ds_config)
        self._check_head(model)
        if self.section.embedding_rank:
            factor_word_embedding(model, self.section.embedding_rank)
        return model

    def before_training(self, training: StageTraining) -> None:
        trainer = training.trainer
        look_at_given_teacher(self.context, trainer.teacher.answer if trainer.teacher else answering(trainer, None))

    def _method(self) -> Method[Structure]:
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
