"""What a checkpoint holds beside the engine: all that turns its shards into a model that can be checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

import dsprune
from dsprune.consolidate import verify
from dsprune.engine.checkpoints.store import Snapshot, save_verification_batch
from dsprune.engine.learning.trainer import Trainer
from dsprune.engine.models.side_files import copy_side_files
from dsprune.engine.ranks.pulse import pulse
from dsprune.engine.zero.config import engine_precision
from dsprune.files import write_json
from dsprune.measure.latency.models import DenseModel
from dsprune.methods.tracking import landing_of
from dsprune.pretrained import resolve_source
from dsprune.run.context import RunContext
from dsprune.run.preflight import dense_model, measure_speedup
from dsprune.run.training.given_teacher import recorded_teacher
from dsprune.run.training.scoring import model_logits
from dsprune.run.training.timed_landing import TimedLanding, land_on_speedup
from dsprune.run_folder import DESCRIPTION, FIGURES, SELECTION, VERIFICATION, StageName
from dsprune.structure import Selection
from dsprune.tasks import TextTask

__all__ = ["Origin", "Snapshots"]

VERIFY_EXAMPLES = 8
"""Evaluation examples that consolidation compares logits on."""
OF_OUTPUTS = ("id2label", "label2id", "problem_type", "tie_word_embeddings", "own_head")
"""Keys of a configuration that say what the model's outputs are."""


@dataclass(frozen=True)
class Origin:
    """Where a student's weights came from: it decides what is written beside them. Empty: the configured model.

    Attributes:
        dense: folder of the fine-tuned dense model that it started from.
        compact: folder of the compact model that it started from, whose sizes it keeps.
    """

    dense: str | None = None
    compact: Path | None = None


class Snapshots:
    """Takes the snapshots of one stage.

    Args:
        context: of the run.
        stage: that trains.
        trainer: of its student.
        origin: of the student's weights.
    """

    def __init__(self, context: RunContext, stage: StageName, trainer: Trainer, origin: Origin) -> None:
        self.context = context
        self.stage = stage
        self.trainer = trainer
        self.origin = origin
        self._dense: DenseModel | None = None

    def trained_with(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return {
            **self.context.settings(self.stage),
            "precision": engine_precision(self.trainer.engine),
            "examples": self.context.provenance.examples,
        }

    def take(self, done: int, scores: dict[str, float], score: float | None, own: Mapping[str, Any]) -> Snapshot:
        """What to save after so many steps. Collective: all ranks must call.

        Args:
            done: optimizer steps done.
            scores: metrics of the last evaluation, by name.
            score: the one number of them that checkpoints compete by; None where this one does not.
            own: state of the training loop.
        """
        trainer = self.trainer
        method = trainer.replica.method if trainer.replica else None
        distances = trainer.matcher.distances if trainer.matcher else None
        batch = self._verification_batch()
        to_be_exported = done == trainer.total_steps or score is not None
        selection, timed = (None, None) if method is None else self._select(method, to_be_exported)
        gates = None if selection is None else selection.gates
        logits = model_logits(trainer, batch, gates)
        landing = None if method is None or gates is None else landing_of(method, done, gates)
        figures = self._figures(scores) | ({} if landing is None else {"landing": landing.to_dict()})
        figures |= {} if timed is None else {"speedup": timed.to_dict()}

        def describe(folder: Path) -> None:
            self._describe_model(folder / DESCRIPTION, trainer.engine.module.model)
            save_verification_batch(folder / VERIFICATION, batch)
            verify.record(folder, logits)
            if selection is not None:
                selection.save(folder / SELECTION)
            write_json(folder / FIGURES, figures)

        return Snapshot(
            step=done,
            state={"metrics": scores, "settings": self.trained_with(), **own},
            tensors={} if distances is None else {"distances": distances},
            score=score,
            describe=describe,
            provenance=self.context.provenance.facts,
        )

    def _select(self, method: Any, to_be_exported: bool) -> tuple[Any, TimedLanding | None]:
        """A method's choice; where it may be exported and a speedup was asked for, landed on that as measured."""
        context, world = self.context, self.context.world
        if not to_be_exported or self.stage != "prune" or context.config.prune.speedup is None:
            return method.select(), None

        def measure(selection: Selection) -> float:
            measured = 0.0
            with world.together("measuring the choice of units"):
                if world.is_main:
                    self._dense = self._dense or dense_model(context.config, context.task)
                    measured = measure_speedup(context.config, self._dense, selection)
            return world.broadcast(measured, "sharing the measured speedup")

        pulse.at(phase="measuring the choice of units")
        selection, timed = land_on_speedup(method.budget, method.select_at, measure)
        context.journal.say(f"{'warning: ' if timed.missed else ''}{self.stage}: {timed.describe()}")
        return selection, timed

    def _verification_batch(self) -> dict[str, Tensor]:
        """Real evaluation examples, as arguments of the model."""
        first, task = next(iter(self.context.data.evals.values())), self.context.task
        batch = first.collate(list(range(min(VERIFY_EXAMPLES, len(first)))))
        labels = batch.pop("labels")
        if isinstance(task, TextTask):
            batch = task.arguments(self.trainer.engine.module.model, batch, labels)
        return batch

    def _describe_model(self, folder: Path, model: PreTrainedModel) -> None:
        """Write what turns weights into a model: configuration, tokenizer, what else lies beside them.

        Args:
            folder: to be made.
            model: that is trained.
        """
        folder.mkdir()
        asked, compact = self.context.config.model, self.origin.compact
        name = resolve_source(asked.name)
        source = str(compact or self.origin.dense or name)
        copy_side_files(name, source, self.context.findings.tokenizer, folder, revision=asked.revision)
        if compact is not None:
            config = json.loads((compact / "config.json").read_text(encoding="utf-8"))
            # The sizes are those of the folder; of the outputs the live model knows better.
            live = json.loads(model.config.to_json_string(use_diff=False))
            write_json(folder / "config.json", {**config, **{key: live[key] for key in OF_OUTPUTS if key in live}})
            return
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)

    def _figures(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """Figures for the model card."""
        context, config = self.context, self.context.config
        given = recorded_teacher(context)
        dense = given.metrics if given is not None else context.folder.facts("teacher").get("metrics", {})
        return {
            "dsprune": dsprune.__version__,
            "stage": self.stage,
            "task": context.task.name,
            "base_model": config.model.name,
            "method": config.method.name,
            "target": context.findings.budget.target,
            "counted": context.findings.budget.describe(),
            "metric": dict(scores),
            "notes": list(context.data.notes),
            "dense": dict(dense),
        }
