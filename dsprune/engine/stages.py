"""The stages of a run, each finished once: teacher, prune, consolidate, recover, evaluate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

import dsprune
from dsprune.config import OptimConfig, RunConfig
from dsprune.consolidate import kept_heads, open_checkpoint
from dsprune.distill import default_teacher_layers
from dsprune.engine.batches import Batches
from dsprune.engine.checkpoint import CheckpointStore, Snapshot, save_verification_batch
from dsprune.engine.course import Course, Pace
from dsprune.engine.ds_config import engine_precision, student_config
from dsprune.engine.evaluate import Forward, evaluate_all
from dsprune.engine.factoring import factor_word_embedding
from dsprune.engine.journal import Journal, write_json
from dsprune.engine.models import checkpoint_activations, encoder_layers, load_model, release, resolve_source, whole
from dsprune.engine.preflight import Preflight, build_method
from dsprune.engine.provenance import Provenance
from dsprune.engine.replica import Replica
from dsprune.engine.resume import Restored, check_drift, find_newest, restore
from dsprune.engine.status import Status
from dsprune.engine.stop import Stop, unheard
from dsprune.engine.student import Student, build_student_engine
from dsprune.engine.teacher import Teacher
from dsprune.engine.teacher_score import score_teacher
from dsprune.engine.trainer import LayerMatcher, Trainer
from dsprune.engine.world import World
from dsprune.errors import CheckpointError, ConfigError, Preempted
from dsprune.methods import Method, Plan
from dsprune.methods.mlpruning_blocks import BlockPruning
from dsprune.methods.noise import stable_seed
from dsprune.structure import (
    BlockGating,
    Selection,
    analyze_blocks,
    attach_gates,
    block_magnitudes,
    unit_magnitudes,
)
from dsprune.tasks import TaskData, TextTask

__all__ = ["Run"]

VERIFY_EXAMPLES = 8
"""Evaluation examples that consolidation compares logits on."""


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
        self.folder = Path(config.output)
        self.status = Status(self.folder, active=world.is_main)
        self.batches = Batches(data.train, ready.batch, world, config.seed)
        if "prune" in config.stages:
            # Now that an epoch has a length, see that the method's phases fit, before the teacher trains.
            self._method()

    # --- what is already there -------------------------------------------------------------

    def _settings(self, stage: str) -> dict[str, Any]:
        """The part of the configuration that decides what a stage produces."""
        whole = self.config.model_dump(mode="json")
        common = ["seed", "model", "task", "data", "batch"]
        own = {
            "teacher": ["teacher"],
            "prune": ["teacher", "method", "prune", "shape", "distill"],
            "consolidate": ["teacher", "method", "prune", "shape", "distill"],
            "recover": ["teacher", "method", "prune", "shape", "distill", "recover"],
            "blocks": ["teacher", "method", "prune", "shape", "distill", "recover", "blocks"],
            "evaluate": ["teacher", "method", "prune", "shape", "distill", "recover", "blocks", "eval"],
        }
        # How a batch is cut over ranks decides nothing.
        whole["batch"] = {"size": self.config.batch.size}
        return {key: whole[key] for key in common + own[stage]}

    def is_done(self, stage: str) -> bool:
        """Whether a stage is finished, with the settings of this launch.

        Raises:
            ConfigError: it was finished with other settings.
        """
        path = self.folder / stage / "done.json"
        if not path.exists():
            return False
        done = json.loads(path.read_text(encoding="utf-8"))["settings"]
        ours = self._settings(stage)
        changed = [key for key in ours if done.get(key) != ours[key]]
        if changed:
            raise ConfigError(
                f"stage '{stage}' in {self.folder} was finished with other settings of {', '.join(changed)}: "
                f"choose another output=, or remove {path.parent} to redo it"
            )
        return True

    def _finish(self, stage: str, **facts: Any) -> None:
        if self.world.is_main:
            (self.folder / stage).mkdir(parents=True, exist_ok=True)
            write_json(self.folder / stage / "done.json", {"settings": self._settings(stage), **facts})
        self.world.gather(None)

    def _facts(self, stage: str) -> dict[str, Any]:
        path = self.folder / stage / "done.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def given_teacher(self) -> dict[str, Any] | None:
        """Where the teacher came from and what it scored before pruning; None where it was trained here."""
        path = self.folder / "teacher" / "given.json"
        if self.config.teacher.path is None or not path.exists():
            return None
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return (
            {key: facts[key] for key in ("path", "metrics")} if facts["settings"] == self._settings("teacher") else None
        )

    @property
    def teacher_source(self) -> str:
        """Where the fine-tuned dense model is.

        Raises:
            ConfigError: it was neither given nor fine-tuned.
        """
        if self.config.teacher.path is not None:
            return resolve_source(self.config.teacher.path)
        folder = self.folder / "teacher" / "model"
        if not (folder / "config.json").exists():
            raise ConfigError(f"there is no teacher in {folder}: run stage 'teacher' first, or give teacher.path=")
        return str(folder)

    @property
    def compact_source(self) -> Path:
        """Folder of the consolidated model.

        Raises:
            ConfigError: nothing was consolidated yet.
        """
        folder = self.folder / "compact"
        if not (folder / "config.json").exists():
            raise ConfigError(f"there is no compact model in {folder}: run stage 'consolidate' first")
        return folder

    @property
    def recovered_source(self) -> Path:
        """Folder of the compact model before blocks: the recovered one where there is one."""
        recovered = self.folder / "recovered"
        return recovered if (recovered / "config.json").exists() else self.compact_source

    @property
    def final_source(self) -> Path:
        """Folder of the last compact model."""
        sparse = self.folder / "sparse"
        return sparse if (sparse / "config.json").exists() else self.recovered_source

    # --- stages -----------------------------------------------------------------------------

    def run_stage(self, stage: str) -> None:
        """Run one stage, or say that it is finished. Collective: all ranks must call."""
        if self.is_done(stage):
            self.journal.say(f"{stage}: already finished in {self.folder}")
            return
        self.status.stage, self.status.step = stage, 0
        self.status.write("running")
        self.stop.check(self.world, f"before stage '{stage}'")
        began = time.perf_counter()
        getattr(self, f"_{stage}")()
        self.journal.say(f"{stage}: finished in {time.perf_counter() - began:.0f} s")

    def _seed(self, purpose: str) -> None:
        torch.manual_seed(stable_seed(purpose, self.config.seed))

    def _student_ds(self, optim: OptimConfig) -> dict[str, Any]:
        """The student's DeepSpeed configuration with this stage's clipping."""
        unfilled = {k: v for k, v in self.ready.student_ds.items() if k != "gradient_clipping"}
        return student_config(unfilled, self.ready.batch, clip=optim.clip)

    def _teacher(self) -> None:
        if self.config.teacher.path is not None:
            self.journal.say(f"teacher: given, {self.config.teacher.path}")
            return
        config = self.config.teacher
        ds_config = self._student_ds(config)
        self._seed("head")
        model = self._load_student(self.config.model.name, ds_config)
        student = Student(model, self.task)
        engine = build_student_engine(student, ds_config, lr=config.lr, weight_decay=config.weight_decay)
        trainer = self._trainer("teacher", engine, config, config.duration.steps(self.batches.steps_per_epoch))
        best, scores = self._train(trainer, {"figures": {"stage": "teacher"}})
        release(engine)
        self._export(best, self.folder / "teacher" / "model")
        self._finish("teacher", checkpoint=str(best), metrics=scores)

    def _prune(self) -> None:
        config = self.config.prune
        method = self._method()
        total = method.plan.total_steps
        teacher = self._load_teacher()
        self._look_at(teacher)
        ds_config = self._student_ds(config)
        source = self.teacher_source if config.start == "teacher" else self.config.model.name
        self._seed("head")
        model = self._load_student(source, ds_config)
        if config.embedding_rank:
            factor_word_embedding(model, config.embedding_rank)
        student = Student(
            model,
            self.task,
            distill=self.config.distill,
            teacher=(teacher.width, self.ready.teacher_layers),
            gating=attach_gates(model, self.ready.structure, empty=method.empty),
        )
        if method.wants_magnitudes:
            magnitudes = unit_magnitudes(self.ready.structure, lambda name: whole(model, name))
            method.begin(self.world.broadcast(magnitudes))
        engine = build_student_engine(student, ds_config, lr=config.lr, weight_decay=config.weight_decay)
        sources = tuple(range(self.ready.structure.sizes.num_layers))
        trainer = self._trainer("prune", engine, config, total, teacher, sources, Replica(method))
        last, scores = self._train(trainer, {"method": method})
        release(engine, teacher.engine)
        self._finish("prune", checkpoint=str(last), metrics=scores)

    def _consolidate(self) -> None:
        facts = self._facts("prune")
        if not facts:
            raise ConfigError(f"stage 'prune' is not finished in {self.folder}: run it first")
        self._export(Path(facts["checkpoint"]), self.folder / "compact")
        self._finish("consolidate", model=str(self.folder / "compact"))

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
            teacher=(teacher.width, self.ready.teacher_layers),
            projections=self._pruned_projections(),
            head_sources=kept_heads(facts) if (facts := getattr(model.config, "dsprune", None)) else None,
        )
        engine = build_student_engine(student, ds_config, lr=config.lr, weight_decay=config.weight_decay)
        sources = self._compact_layers(source)
        trainer = self._trainer("recover", engine, config, total, teacher, sources)
        best, scores = self._train(trainer, {"source": source})
        release(engine, teacher.engine)
        self._export(best, self.folder / "recovered")
        self._finish("recover", checkpoint=str(best), metrics=scores, model=str(self.folder / "recovered"))

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
        num_layers = len(encoder_layers(model))
        layers = self._block_teacher_layers(num_layers)
        teacher = self._load_teacher(str(source), layers)
        student = Student(
            model,
            self.task,
            distill=self.config.distill,
            teacher=(teacher.width, layers),
            gating=BlockGating(model, structure),
        )
        engine = build_student_engine(student, ds_config, lr=config.lr, weight_decay=config.weight_decay)
        sources = tuple(range(num_layers))
        trainer = self._trainer("blocks", engine, config, total, teacher, sources, Replica(method), layers=layers)
        last, scores = self._train(trainer, {"method": method, "source": source})
        release(engine, teacher.engine)
        self._export(last, self.folder / "sparse")
        self._finish("blocks", checkpoint=str(last), metrics=scores, model=str(self.folder / "sparse"))

    def _block_plan(self, total: int) -> Plan:
        config = self.config.blocks
        return Plan(config.target, "encoder", total, self.batches.steps_per_epoch, self.config.seed)

    def _block_teacher_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of the compact teacher: those that were asked for, as far as it has them."""
        asked = self.config.distill.teacher_layers or default_teacher_layers(num_layers)
        return tuple(layer for layer in asked if layer <= num_layers)

    def _evaluate(self) -> None:
        from dsprune.engine.report import write_report

        write_report(self)
        self._finish("evaluate")

    # --- parts of a training stage ----------------------------------------------------------

    def _method(self) -> Method:
        per_epoch = self.batches.steps_per_epoch
        total = self.config.prune.duration.steps(per_epoch)
        return build_method(self.config, self.ready.structure, total_steps=total, steps_per_epoch=per_epoch)

    def _load_student(self, source: str, ds_config: Mapping[str, Any]) -> PreTrainedModel:
        """A model that is to be trained: the configured one, or one that an earlier stage left."""
        config = self.config.model
        pretrained = source == config.name
        model = load_model(
            source,
            self.task,
            ds_config,
            revision=config.revision if pretrained else None,
            from_scratch=config.from_scratch and pretrained,
        )
        if self.config.student.activation_checkpointing:
            checkpoint_activations(model)
        return model

    def _load_teacher(self, source: str | None = None, layers: tuple[int, ...] | None = None) -> Teacher:
        """The teacher's engine: by default the dense model and the configured layers."""
        distill = self.config.distill
        wanted = distill.layers > 0 or distill.attentions > 0
        return Teacher(
            source or self.teacher_source,
            self.task,
            self.ready.teacher_ds,
            (self.ready.teacher_layers if layers is None else layers) if wanted else (),
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
            pulse=lambda: self.stop.check(self.world, "while scoring the teacher"),
            say=self.journal.say,
        )
        self.journal.forget_after("teacher", -1)
        self.journal.log("teacher", 0, {f"eval/{name}": value for name, value in scores.items()})
        self.journal.say("teacher: given, " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        if self.world.is_main:
            (self.folder / "teacher").mkdir(exist_ok=True)
            facts = {"path": path, "metrics": scores, "settings": self._settings("teacher")}
            write_json(self.folder / "teacher" / "given.json", facts)

    def _compact_layers(self, folder: Path) -> tuple[int, ...]:
        """For each layer of the compact model, the dense layer that it was."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = config.get("dsprune")
        if facts is None:
            return tuple(range(self.ready.structure.sizes.num_layers))
        return tuple(layer["source"] for layer in facts["layers"])

    def _pruned_projections(self) -> list[tuple[Tensor, Tensor]]:
        """The projections that pruning trained, cut to the hidden dimensions that are left."""
        checkpoint = Path(self._facts("prune").get("checkpoint", ""))
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
            layers = self.ready.teacher_layers if layers is None else layers
            matcher = LayerMatcher(self.config.distill.match, layers, sources, teacher.layer_stacks)
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

    def _train(self, trainer: Trainer, about: Mapping[str, Any]) -> tuple[Path, dict[str, float]]:
        """Train to the end of the stage, from its newest checkpoint if it has one.

        Returns:
            The checkpoint to export (the best one, or where gates are learned the last) and its metrics.
        """
        stage, gated = trainer.stage, trainer.replica is not None
        store = CheckpointStore(
            self.folder / stage / "checkpoints",
            stage,
            self.world,
            keep=self.config.checkpoint.keep,
            method=self.config.method.name if stage != "teacher" else None,
        )
        per_epoch = self.batches.steps_per_epoch
        course = Course(
            trainer,
            store,
            self.journal,
            self.status,
            Pace(
                evaluate=max(1, self.config.eval.every.steps(per_epoch)),
                save=max(1, self.config.checkpoint.every.steps(per_epoch)),
                log=self.config.log.every,
            ),
            scored=not gated,
            evaluate=lambda done: self._evaluate_student(trainer, done),
            score=self.task.merit,
            snapshot=lambda done, scores, score, own: self._snapshot(trainer, done, scores, score, about, own),
        )
        course.run(self._resume(trainer, store))
        chosen = self.world.broadcast(store.newest() if gated else store.best())
        assert chosen is not None
        return chosen, json.loads((chosen / "state.json").read_text(encoding="utf-8"))["metrics"]

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
            **self._settings(trainer.stage),
            "precision": engine_precision(trainer.engine),
            "examples": self.provenance.examples,
        }

    def _forward(self, trainer: Trainer, done: int) -> Forward:
        """A student that answers, under the gates that its method has after so many steps."""
        engine = trainer.engine
        engine.eval()
        gates = trainer.replica.method.deterministic(done) if trainer.replica else None
        if gates is not None:
            gates = {kind: gate.to(self.world.device) for kind, gate in gates.items()}
        return lambda inputs, labels: engine(inputs, labels, None, gates)[0]  # type: ignore[no-any-return]

    def _evaluate_student(self, trainer: Trainer, done: int) -> dict[str, float]:
        scores = evaluate_all(
            self._forward(trainer, done),
            self.task,
            self.data.evals,
            self.world,
            batch_size=self.config.batch.eval,
            pulse=lambda: self.stop.check(self.world, f"{trainer.stage} step {done}, while evaluating, saved"),
        )
        self.journal.log(trainer.stage, done, {f"eval/{name}": value for name, value in scores.items()})
        self.journal.say(f"{trainer.stage}: step {done}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        return scores

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
        return Snapshot(
            step=done,
            state={"metrics": scores, "settings": self._trained_with(trainer), **own},
            tensors={} if distances is None else {"distances": distances},
            score=score,
            describe=lambda folder: self._describe(folder, trainer, scores, about),
            provenance=self.provenance.facts,
        )

    def _describe(self, folder: Path, trainer: Trainer, scores: Mapping[str, float], about: Mapping[str, Any]) -> None:
        """Write what turns weights into a model: configuration, tokenizer, selection, a batch, figures."""
        model = folder / "model"
        model.mkdir()
        if "source" in about:
            for path in about["source"].iterdir():
                if path.suffix in (".json", ".py", ".txt", ".model") and "safetensors" not in path.name:
                    shutil.copy2(path, model / path.name)
        else:
            hf_model = trainer.engine.module.model
            config = type(hf_model.config).from_dict(hf_model.config.to_dict())
            config.architectures = [type(hf_model).__name__]
            config.save_pretrained(model)
            self.ready.tokenizer.save_pretrained(model)
        first = next(iter(self.data.evals.values()))
        batch = first.collate(list(range(min(VERIFY_EXAMPLES, len(first)))))
        labels = batch.pop("labels")
        if isinstance(self.task, TextTask):
            batch = self.task.arguments(trainer.engine.module.model, batch, labels)
        save_verification_batch(folder / "verify.safetensors", batch)
        if "method" in about:
            about["method"].select().save(folder / "selection.safetensors")
        write_json(folder / "figures.json", self._figures(trainer.stage, scores))

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
            "dense": (self.given_teacher() or self._facts("teacher")).get("metrics", {}),
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
