"""The stages of a run, each finished once: teacher, prune, consolidate, recover, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

import dsprune
from dsprune.config import OptimConfig, RunConfig
from dsprune.consolidate import kept_heads, open_checkpoint, read_manifest, verify
from dsprune.distill import default_teacher_layers
from dsprune.engine.checkpoints.resume import Restored, check_drift, find_newest, restore
from dsprune.engine.checkpoints.store import CheckpointStore, Snapshot, save_verification_batch
from dsprune.engine.learning.batches import Batches
from dsprune.engine.learning.evaluate import Forward, evaluate_all
from dsprune.engine.learning.replica import Replica
from dsprune.engine.learning.student import Student, build_student_engine
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.learning.trainer import LayerMatcher, Trainer
from dsprune.engine.models.factoring import factor_word_embedding
from dsprune.engine.models.freezing import freeze_embeddings
from dsprune.engine.models.load import checkpoint_activations, load_model
from dsprune.engine.models.side_files import copy_side_files
from dsprune.engine.ranks.pulse import pulse
from dsprune.engine.ranks.stop import Stop, unheard
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.config import DsConfig, engine_precision, with_clip
from dsprune.engine.zero.gather import release, whole
from dsprune.errors import CheckpointError, ConfigError, Preempted
from dsprune.files import read_json, write_json
from dsprune.methods import Method, Plan
from dsprune.methods.mlpruning_blocks import BlockPruning
from dsprune.methods.noise import stable_seed
from dsprune.methods.tracking import has_reached, landing_of
from dsprune.pretrained import resolve_source
from dsprune.run.journal import Journal
from dsprune.run.preflight import Preflight, build_method
from dsprune.run.provenance import Provenance
from dsprune.run.settling import settle
from dsprune.run.status import Status
from dsprune.run.teacher_score import score_teacher
from dsprune.run.teaching import student_stacks
from dsprune.run.training_loop import Pace, TrainingLoop
from dsprune.run_folder import RunFolder, StageName
from dsprune.structure import (
    BlockGating,
    Gates,
    Selection,
    analyze_blocks,
    attach_gates,
    block_magnitudes,
    unit_magnitudes,
)
from dsprune.structure.layout import layer_paths
from dsprune.tasks import TaskData, TextTask

__all__ = ["Run"]

VERIFY_EXAMPLES = 8
"""Evaluation examples that consolidation compares logits on."""
OF_OUTPUTS = ("id2label", "label2id", "problem_type", "tie_word_embeddings", "own_head")
"""Keys of a configuration that say what the model's outputs are."""


class Run:
    """One run folder and the stages that fill it.

    Args:
        config: checked configuration.
        ready: what `preflight` found.
        data: loaded and tokenised data.
        world: the ranks.
        journal: metrics of the run.
        stop: tells whether this rank was asked to stop.
        provenance: where model and data came from.
    """

    teachers_have_weights: ClassVar[bool] = True
    """Whether the folder of a teacher holds weights; those of a rehearsal hold a configuration alone."""

    def __init__(
        self,
        config: RunConfig,
        ready: Preflight,
        data: TaskData,
        world: World,
        journal: Journal,
        stop: Stop,
        provenance: Provenance,
    ) -> None:
        self.config = config
        self.ready = ready
        self.task = ready.task
        self.data = data
        self.world = world
        self.journal = journal
        self.stop = stop
        self.provenance = provenance
        self.folder = RunFolder(config.output)
        self.status = Status(self.folder, active=world.is_main)
        self.batches = Batches(data.train, ready.batch, world, config.seed)
        if "prune" in config.stages:
            # Now that an epoch has a length, see that the method's phases fit, before the teacher trains.
            self._method()

    # --- what is already there -------------------------------------------------------------

    def _settings(self, stage: StageName) -> dict[str, Any]:
        """The part of the configuration that decides what a stage produces."""
        return self.folder.settings(stage, self.config.model_dump(mode="json"))

    def is_done(self, stage: StageName) -> bool:
        """Whether a stage is finished, with the settings of this launch.

        Raises:
            ConfigError: it was finished with other settings.
        """
        return self.folder.is_done(stage, self.config.model_dump(mode="json"))

    def _finish(self, stage: StageName, **facts: Any) -> None:
        if self.world.is_main:
            self.folder.mark_done(stage, self.config.model_dump(mode="json"), **facts)
        self.world.gather(None, f"finishing stage '{stage}'")

    def landing(self, stage: StageName) -> dict[str, Any]:
        """How a finished stage that learned gates came to its target; empty where that is not known."""
        facts: dict[str, Any] = self.folder.facts(stage).get("landing", {})
        return facts

    def given_teacher(self) -> dict[str, Any] | None:
        """Where the teacher came from and what it scored before pruning; None where it was trained here."""
        path = self.folder.given_teacher
        if self.config.teacher.path is None or not path.exists():
            return None
        facts: dict[str, Any] = read_json(path)
        same = facts["settings"] == self._settings("teacher")
        return {key: facts[key] for key in ("path", "metrics")} if same else None

    @property
    def teacher_source(self) -> str:
        """Where the fine-tuned dense model is.

        Raises:
            ConfigError: it was neither given nor fine-tuned.
        """
        if self.config.teacher.path is not None:
            return resolve_source(self.config.teacher.path)
        folder = self.folder.model_of("teacher")
        if not self.folder.has_model("teacher"):
            raise ConfigError(f"there is no teacher in {folder}: run stage 'teacher' first, or give teacher.path=")
        return str(folder)

    @property
    def compact_source(self) -> Path:
        """Folder of the consolidated model.

        Raises:
            ConfigError: nothing was consolidated yet.
        """
        folder = self.folder.model_of("consolidate")
        if not self.folder.has_model("consolidate"):
            raise ConfigError(f"there is no compact model in {folder}: run stage 'consolidate' first")
        return folder

    @property
    def recovered_source(self) -> Path:
        """Folder of the compact model before blocks: the recovered one where there is one."""
        return self.folder.last_model(before="blocks") or self.compact_source

    @property
    def final_source(self) -> Path:
        """Folder of the last compact model."""
        return self.folder.last_model() or self.compact_source

    # --- stages -----------------------------------------------------------------------------

    def run_stage(self, stage: StageName) -> None:
        """Run one stage, or say that it is finished. Collective: all ranks must call."""
        if self.is_done(stage):
            self.journal.say(f"{stage}: already finished in {self.folder}")
            return
        self.status.stage, self.status.step = stage, 0
        self.status.write("running")
        pulse.at(stage=stage, step=0, phase="starting")
        self.stop.check(self.world, f"before stage '{stage}'")
        began = time.perf_counter()
        getattr(self, f"_{stage}")()
        self.journal.say(f"{stage}: finished in {time.perf_counter() - began:.0f} s")

    def _seed(self, purpose: str) -> None:
        torch.manual_seed(stable_seed(purpose, self.config.seed))

    def _student_ds(self, optim: OptimConfig) -> DsConfig:
        """The student's DeepSpeed configuration with this stage's clipping."""
        return with_clip(self.ready.student_ds, optim.clip)

    def _teacher(self) -> None:
        if self.config.teacher.path is not None:
            self.journal.say(f"teacher: given, {self.config.teacher.path}")
            return
        config = self.config.teacher
        ds_config = self._student_ds(config)
        self._seed("head")
        model = self._load_student(None, ds_config)
        student = Student(model, self.task)
        engine = self._engine(student, ds_config, config)
        trainer = self._trainer("teacher", engine, config, config.duration.steps(self.batches.steps_per_epoch))
        best, scores = self._train(trainer, {})
        release(engine)
        self._export(best, self.folder.model_of("teacher"))
        self._finish("teacher", checkpoint=str(best), metrics=scores)

    def _prune(self) -> None:
        config = self.config.prune
        method = self._method()
        total = method.plan.total_steps
        teacher = self._load_teacher()
        self._look_at(teacher)
        ds_config = self._student_ds(config)
        source = self.teacher_source if config.start == "teacher" else None
        self._seed("head")
        model = self._load_student(source, ds_config)
        self._check_head(model)
        if config.embedding_rank:
            factor_word_embedding(model, config.embedding_rank)
        student = Student(
            model,
            self.task,
            distill=self.config.distill,
            teacher=(teacher.width, self.ready.teaching.layers),
            gating=attach_gates(model, self.ready.structure, empty=method.empty),
        )
        if method.wants_magnitudes:
            magnitudes = unit_magnitudes(self.ready.structure, lambda name: whole(model, name))
            method.begin(self.world.broadcast(magnitudes))
        engine = self._engine(student, ds_config, config)
        sources = tuple(range(self.ready.structure.sizes.num_layers))
        trainer = self._trainer("prune", engine, config, total, teacher, sources, Replica(method))
        chosen, scores = self._train(trainer, {"method": method, "source": source})
        landing = self._settle(trainer, chosen)
        release(engine, teacher.engine)
        self._finish("prune", checkpoint=str(chosen), metrics=scores, landing=landing)

    def _consolidate(self) -> None:
        facts = self.folder.facts("prune")
        if not facts:
            raise ConfigError(f"stage 'prune' is not finished in {self.folder}: run it first")
        self._export(self.folder.chosen_checkpoint("prune"), self.folder.model_of("consolidate"))
        self._finish("consolidate", model=str(self.folder.model_of("consolidate")))

    def _recover(self) -> None:
        config = self.config.recover
        total = config.duration.steps(self.batches.steps_per_epoch)
        source = self.compact_source
        if total == 0:
            self.journal.say("recover: 0 steps, skipped")
            return
        teacher = self._load_teacher()
        ds_config = self._student_ds(config)
        model = self._load_student(str(source), ds_config)
        student = Student(
            model,
            self.task,
            distill=self.config.distill,
            teacher=(teacher.width, self.ready.teaching.layers),
            projections=self._pruned_projections(),
            head_sources=kept_heads(facts) if (facts := getattr(model.config, "dsprune", None)) else None,
        )
        engine = self._engine(student, ds_config, config)
        sources = self._compact_layers(source)
        trainer = self._trainer("recover", engine, config, total, teacher, sources)
        best, scores = self._train(trainer, {"compact": source})
        release(engine, teacher.engine)
        self._export(best, self.folder.model_of("recover"))
        self._finish("recover", checkpoint=str(best), metrics=scores, model=str(self.folder.model_of("recover")))

    def _blocks(self) -> None:
        """MLPruning's second step, on whatever compact model there is; that model also teaches."""
        config = self.config.blocks
        total = config.duration.steps(self.batches.steps_per_epoch)
        source = self.recovered_source
        if total == 0:
            self.journal.say("blocks: 0 steps, skipped")
            return
        ds_config = self._student_ds(config)
        model = self._load_student(str(source), ds_config)
        structure = analyze_blocks(model, config.shape)
        method = BlockPruning(structure, config, self._block_plan(total))
        if method.wants_magnitudes:
            method.begin(self.world.broadcast(block_magnitudes(structure, lambda name: whole(model, name))))
        num_layers = len(layer_paths(model))
        layers = self._block_teacher_layers(num_layers)
        teacher = self._load_teacher(str(source), layers)
        student = Student(
            model,
            self.task,
            distill=self.config.distill,
            teacher=(teacher.width, layers),
            gating=BlockGating(model, structure),
        )
        engine = self._engine(student, ds_config, config)
        sources = tuple(range(num_layers))
        trainer = self._trainer("blocks", engine, config, total, teacher, sources, Replica(method), layers=layers)
        last, scores = self._train(trainer, {"method": method, "compact": source})
        landing = self._settle(trainer, last)
        release(engine, teacher.engine)
        self._export(last, self.folder.model_of("blocks"))
        self._finish(
            "blocks", checkpoint=str(last), metrics=scores, model=str(self.folder.model_of("blocks")), landing=landing
        )

    def _block_plan(self, total: int) -> Plan:
        config = self.config.blocks
        return Plan(config.target, "encoder", total, self.batches.steps_per_epoch, self.config.seed)

    def _block_teacher_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of the compact teacher: those that learned in its place, as far as it has them."""
        distill = self.config.distill
        asked: tuple[int, ...] = default_teacher_layers(num_layers)
        if distill.teacher_layers is not None or distill.layer_pairs is not None:
            asked = tuple(sorted(set(self.ready.teaching.partners)))
        elif distill.teacher_draw != "all":
            asked = tuple(range(1, num_layers + 1))
        return tuple(layer for layer in asked if layer <= num_layers)

    def _evaluate(self) -> None:
        from dsprune.run.report import write_report

        write_report(self)
        self._finish("evaluate")

    # --- parts of a training stage ----------------------------------------------------------

    def _method(self) -> Method:
        per_epoch = self.batches.steps_per_epoch
        total = self.config.prune.duration.steps(per_epoch)
        return build_method(self.config, self.ready.structure, total_steps=total, steps_per_epoch=per_epoch)

    def _load_student(self, source: str | None, ds_config: Mapping[str, Any]) -> PreTrainedModel:
        """A model that is to be trained: one that an earlier stage left, or None for the configured one."""
        config = self.config.model
        if source is None:
            model = load_model(
                config.name,
                self.task,
                ds_config,
                revision=config.revision,
                from_scratch=config.from_scratch,
                fresh_head=True,
            )
        else:
            model = load_model(source, self.task, ds_config)
        if self.config.student.activation_checkpointing:
            checkpoint_activations(model)
        return model

    @staticmethod
    def _engine(student: Student, ds_config: Mapping[str, Any], optim: OptimConfig) -> Any:
        """A student as an engine that trains it as one stage asks. Collective: all ranks must call."""
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

    def _check_head(self, model: PreTrainedModel) -> None:
        """See that the head is what preflight took it for, which it cannot know of weights that are yet to come."""
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        if self.ready.structure.tied and head is not None and head.weight is not words.weight:
            raise ConfigError(
                f"model '{self.config.model.name}': its files, which are here only now, hold a head of its own: start "
                "the same command again"
            )

    def _load_teacher(self, source: str | None = None, layers: tuple[int, ...] | None = None) -> Teacher:
        """The teacher's engine: by default the dense model and the configured layers."""
        distill = self.config.distill
        wanted = distill.layers > 0 or distill.attentions > 0
        return Teacher(
            source or self.teacher_source,
            self.task,
            self.ready.teacher_ds,
            (self.ready.teaching.layers if layers is None else layers) if wanted else (),
            attentions=distill.attentions > 0,
            from_scratch=not self.teachers_have_weights,
        )

    def _look_at(self, teacher: Teacher) -> None:
        """Score a given teacher, once, before anybody learns from it. Collective: all ranks must call.

        Raises:
            ArchitectureError: it does worse than chance.
        """
        path = self.config.teacher.path
        if path is None or self.world.broadcast(self.given_teacher()) is not None:
            return
        scores = score_teacher(
            teacher,
            path,
            self.task,
            self.data.evals,
            self.world,
            batch_size=self.config.batch.eval,
            vocab_size=self.ready.vocab_size,
            before_batch=lambda: self.stop.check(self.world, "while scoring the teacher"),
            say=self.journal.say,
        )
        self.journal.forget_after("teacher", -1)
        self.journal.log("teacher", 0, {f"eval/{name}": value for name, value in scores.items()})
        self.journal.say("teacher: given, " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        if self.world.is_main:
            record = self.folder.given_teacher
            record.parent.mkdir(exist_ok=True)
            write_json(record, {"path": path, "metrics": scores, "settings": self._settings("teacher")})

    def _compact_layers(self, folder: Path) -> tuple[int, ...]:
        """For each layer of the compact model, the dense layer that it was."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = config.get("dsprune")
        if facts is None:
            return tuple(range(self.ready.structure.sizes.num_layers))
        return tuple(layer["source"] for layer in facts["layers"])

    def _pruned_projections(self) -> list[tuple[Tensor, Tensor]]:
        """The projections that pruning trained, cut to the hidden dimensions that are left."""
        checkpoint = Path(self.folder.facts("prune").get("checkpoint", ""))
        if self.config.distill.layers == 0 or not (checkpoint / "selection.safetensors").exists():
            return []
        source = open_checkpoint(checkpoint)
        kept = Selection.load(checkpoint / "selection.safetensors").kept(self.ready.structure.hidden)
        count = sum(name.startswith("projections.") and name.endswith(".weight") for name in source.names())
        return [
            (source.read(f"projections.{i}.weight")[:, kept], source.read(f"projections.{i}.bias"))
            for i in range(count)
        ]

    def _trainer(
        self,
        stage: str,
        engine: Any,
        optim: OptimConfig,
        total: int,
        teacher: Teacher | None = None,
        sources: tuple[int, ...] = (),
        replica: Replica | None = None,
        *,
        layers: tuple[int, ...] | None = None,
    ) -> Trainer:
        matcher = None
        if teacher is not None and teacher.has_taps:
            matcher = self._matcher(teacher, sources, layers)
        return Trainer(
            stage=stage,
            engine=engine,
            world=self.world,
            batches=self.batches,
            optim=optim,
            total_steps=total,
            seed=self.config.seed,
            teacher=teacher,
            matcher=matcher,
            replica=replica,
            stop=self.stop,
        )

    def _matcher(self, teacher: Teacher, sources: tuple[int, ...], layers: tuple[int, ...] | None) -> LayerMatcher:
        """Which student layers learn from which; `layers` are those of a teacher that the student was a copy of."""
        distill, plan = self.config.distill, self.ready.teaching
        own = layers is not None
        return LayerMatcher(
            distill.match,
            layers if layers is not None else plan.layers,
            sources,
            teacher.layer_stacks,
            partners=() if own else plan.partners,
            student_stacks=() if own else student_stacks(self.ready.structure),
            draw=distill.teacher_draw,
            seed=self.config.seed,
        )

    def _train(self, trainer: Trainer, about: Mapping[str, Any]) -> tuple[Path, dict[str, float]]:
        """Train to the end of the stage, from its newest checkpoint if it has one.

        Returns:
            The checkpoint to export (the best one, or where gates are learned the last, unless the best one was
            asked for) and its metrics.
        """
        stage = cast(StageName, trainer.stage)
        store = CheckpointStore(
            self.folder.checkpoints(stage),
            stage,
            self.world,
            keep=self.config.checkpoint.keep,
            method=self.config.method.name if stage != "teacher" else None,
        )
        per_epoch = self.batches.steps_per_epoch
        course = TrainingLoop(
            trainer,
            store,
            self.journal,
            self.status,
            Pace(
                evaluate=max(1, self.config.eval.every.steps(per_epoch)),
                save=max(1, self.config.checkpoint.every.steps(per_epoch)),
                log=self.config.log.every,
            ),
            competes=lambda done: self._competes(trainer, done),
            evaluate=lambda done: self._evaluate_student(trainer, done),
            score=self.task.merit,
            snapshot=lambda done, scores, score, own: self._snapshot(trainer, done, scores, score, about, own),
        )
        course.run(self._resume(trainer, store))
        last = trainer.replica is not None and not self._keeps_best(stage)
        chosen = self.world.broadcast(store.newest() if last else store.best())
        assert chosen is not None
        if self._keeps_best(stage):
            self.journal.say(f"{stage}: exporting {chosen.name}, {self._why(chosen)}")
        return chosen, json.loads((chosen / "state.json").read_text(encoding="utf-8"))["metrics"]

    def _keeps_best(self, stage: str) -> bool:
        return stage == "prune" and self.config.prune.keep_best

    def _why(self, checkpoint: Path) -> str:
        if read_manifest(checkpoint)["score"] is None:
            return f"the last one: no evaluation came within {self.config.prune.sparsity_epsilon:g} of the target"
        return "the best one at which the target was reached"

    def _competes(self, trainer: Trainer, done: int) -> bool:
        """Whether a checkpoint of these steps is one of those that the best is picked from."""
        if trainer.replica is None:
            return True
        epsilon = self.config.prune.sparsity_epsilon
        return self._keeps_best(trainer.stage) and has_reached(trainer.replica.method, done, epsilon)

    def _settle(self, trainer: Trainer, chosen: Path) -> dict[str, Any]:
        """Say what landing on the target did, where gates had not come there. Collective."""
        return settle(
            trainer,
            chosen,
            epsilon=self.config.prune.sparsity_epsilon,
            evaluate=lambda gates: self._scores(trainer, gates, "the landed choice"),
            say=self.journal.say,
        )

    def _resume(self, trainer: Trainer, store: CheckpointStore) -> Restored | None:
        config = self.config.checkpoint
        newest = find_newest(store, config.resume, self.journal.say)
        if newest is None:
            return None
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        check_drift(state["settings"], self._trained_with(trainer), config.allow_drift, newest)
        return restore(newest, store, trainer.engine, trainer.replica, reshard=config.reshard, say=self.journal.say)

    def _trained_with(self, trainer: Trainer) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return {
            **self._settings(cast(StageName, trainer.stage)),
            "precision": engine_precision(trainer.engine),
            "examples": self.provenance.examples,
        }

    def _forward(self, trainer: Trainer, done: int) -> Forward:
        """A student that answers, under the gates that its method has after so many steps."""
        return self._answering(trainer, trainer.replica.method.evaluation_gates(done) if trainer.replica else None)

    def _evaluate_student(self, trainer: Trainer, done: int) -> dict[str, float]:
        gates = trainer.replica.method.evaluation_gates(done) if trainer.replica else None
        scores = self._scores(trainer, gates, f"step {done}")
        self.journal.log(trainer.stage, done, {f"eval/{name}": value for name, value in scores.items()})
        self.journal.say(f"{trainer.stage}: step {done}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        return scores

    def _answering(self, trainer: Trainer, gates: Mapping[str, Tensor] | None) -> Forward:
        """A student that answers under some gates; None is the model as it is."""
        engine = trainer.engine
        engine.eval()
        if gates is not None:
            gates = {kind: gate.to(self.world.device) for kind, gate in gates.items()}
        return lambda inputs, labels: engine(inputs, labels, None, gates)[0]  # type: ignore[no-any-return]

    def _scores(self, trainer: Trainer, gates: Mapping[str, Tensor] | None, what: str) -> dict[str, float]:
        """Metrics of the student under some gates; None is the model as it is. Collective."""
        return evaluate_all(
            self._answering(trainer, gates),
            self.task,
            self.data.evals,
            self.world,
            batch_size=self.config.batch.eval,
            before_batch=lambda: self.stop.check(self.world, f"{trainer.stage} {what}, while evaluating, saved"),
        )

    def _snapshot(
        self,
        trainer: Trainer,
        done: int,
        scores: dict[str, float],
        score: float | None,
        about: Mapping[str, Any],
        own: Mapping[str, Any],
    ) -> Snapshot:
        distances = trainer.matcher.distances if trainer.matcher else None
        batch = self._verification_batch(trainer)
        method = about.get("method")
        selection = method.select() if method is not None else None
        gates = None if method is None else method.gates_of(selection)
        logits = self._trained_logits(trainer, batch, gates)
        landing = None if method is None or gates is None else landing_of(method, done, gates)
        figures = self._figures(trainer.stage, scores) | ({} if landing is None else {"landing": landing.to_dict()})

        def describe(folder: Path) -> None:
            self._describe_model(folder / "model", trainer.engine.module.model, about)
            save_verification_batch(folder / "verify.safetensors", batch)
            verify.record(folder, logits)
            if selection is not None:
                selection.save(folder / "selection.safetensors")
            write_json(folder / "figures.json", figures)

        return Snapshot(
            step=done,
            state={"metrics": scores, "settings": self._trained_with(trainer), **own},
            tensors={} if distances is None else {"distances": distances},
            score=score,
            describe=describe,
            provenance=self.provenance.facts,
        )

    def _verification_batch(self, trainer: Trainer) -> dict[str, Tensor]:
        """Real evaluation examples, as arguments of the model."""
        first = next(iter(self.data.evals.values()))
        batch = first.collate(list(range(min(VERIFY_EXAMPLES, len(first)))))
        labels = batch.pop("labels")
        if isinstance(self.task, TextTask):
            batch = self.task.arguments(trainer.engine.module.model, batch, labels)
        return batch

    def _trained_logits(self, trainer: Trainer, batch: Mapping[str, Tensor], gates: Gates | None) -> Tensor:
        """What the engine itself says, now, with the final gates: the export has to say the same. Collective.

        Taken from the live engine, it rests on nothing that was written.
        """
        engine, device = trainer.engine, self.world.device
        gates = None if gates is None else {name: value.to(device) for name, value in gates.items()}
        inputs = {name: tensor.to(device) for name, tensor in verify.shortened(batch).items()}
        engine.eval()
        with torch.no_grad():
            return verify.sample(engine(inputs, None, None, gates, bare=True)[0])

    def _describe_model(self, folder: Path, model: PreTrainedModel, about: Mapping[str, Any]) -> None:
        """Write what turns weights into a model: configuration, tokenizer, what else lies beside them.

        Args:
            folder: to be made.
            model: that is trained.
            about: where its weights came from: `compact`, a folder whose sizes it keeps, or `source`, if it was not
                the configured model.
        """
        folder.mkdir()
        name, compact = resolve_source(self.config.model.name), about.get("compact")
        source = str(compact or about.get("source") or name)
        copy_side_files(name, source, self.ready.tokenizer, folder, revision=self.config.model.revision)
        if compact is not None:
            config = json.loads((compact / "config.json").read_text(encoding="utf-8"))
            # The sizes are those of the folder; of the outputs the live model knows better.
            live = json.loads(model.config.to_json_string(use_diff=False))
            write_json(folder / "config.json", {**config, **{key: live[key] for key in OF_OUTPUTS if key in live}})
            return
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)

    def _figures(self, stage: str, scores: Mapping[str, float]) -> dict[str, Any]:
        """Figures for the model card."""
        return {
            "dsprune": dsprune.__version__,
            "stage": stage,
            "task": self.task.name,
            "base_model": self.config.model.name,
            "method": self.config.method.name,
            "target": self.ready.target,
            "target_of": self.config.prune.target_of,
            "metric": dict(scores),
            "notes": list(self.data.notes),
            "dense": (self.given_teacher() or self.folder.facts("teacher")).get("metrics", {}),
        }

    def _export(self, checkpoint: Path, out: Path) -> None:
        """Consolidate a checkpoint in a process of its own, while all ranks wait. Collective."""
        with self.world.together("consolidating"):
            process = self._start_export(checkpoint, out) if self.world.is_main else None
            # Short collectives instead of one long wait: a large model takes longer than any time-out.
            while (code := self.world.broadcast(process.poll() if process else None)) is None:
                if (reason := self.stop.agreed(self.world)) is not None:
                    if process is not None:
                        process.kill()  # what it wrote so far has no name yet
                        process.wait()
                    raise Preempted(f"stopped by {reason} while consolidating; start the same command again to go on")
                time.sleep(0.5)
            if process is not None and code != 0:
                output = process.stdout.read() if process.stdout else ""
                lines = output.strip().splitlines() or ["no output"]
                raise CheckpointError(f"consolidating {checkpoint} failed with exit code {code}: {lines[-1]}")

    @staticmethod
    def _start_export(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
        root = str(Path(dsprune.__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with unheard():
            return subprocess.Popen(
                [sys.executable, "-m", "dsprune", "consolidate", str(checkpoint), str(out), "--force"],
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
