"""What the stages of one run share: what was asked for and found, the data, the ranks, and the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsprune.config import OptimConfig, RunConfig
from dsprune.engine.learning.batches import Batches
from dsprune.engine.ranks.stop import Stop
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.config import DsConfig, with_clip
from dsprune.errors import ConfigError
from dsprune.methods.noise import stable_seed
from dsprune.pretrained import resolve_source
from dsprune.run.journal import Journal
from dsprune.run.models import ModelSource
from dsprune.run.preflight import Preflight
from dsprune.run.provenance import Provenance
from dsprune.run.status import Status
from dsprune.run_folder import RunFolder, StageName
from dsprune.tasks import Task, TaskData

__all__ = ["RunContext"]


@dataclass(frozen=True)
class RunContext:
    """One run, as its stages see it.

    Attributes:
        config: checked configuration.
        findings: what `preflight` found.
        data: loaded and tokenised data.
        batches: its training examples, cut for this rank.
        models: loads what stages train and learn from.
        world: the ranks.
        folder: of the run.
        status: of the run.
        journal: metrics of the run.
        stop: tells whether this rank was asked to stop.
        provenance: where model and data came from.
    """

    config: RunConfig
    findings: Preflight
    data: TaskData
    batches: Batches
    models: ModelSource
    world: World
    folder: RunFolder
    status: Status
    journal: Journal
    stop: Stop
    provenance: Provenance

    @property
    def task(self) -> Task:
        return self.findings.task

    # --- settings ---------------------------------------------------------------------------

    def settings(self, stage: StageName) -> dict[str, Any]:
        """The part of the configuration that decides what a stage produces."""
        return self.folder.settings(stage, self.config.model_dump(mode="json"))

    def student_ds(self, optim: OptimConfig) -> DsConfig:
        """The student's DeepSpeed configuration with one stage's clipping."""
        return with_clip(self.findings.student_ds, optim.clip)

    def seed(self, purpose: str) -> None:
        """Begin torch's random numbers anew, the same on every rank and in every launch."""
        torch.manual_seed(stable_seed(purpose, self.config.seed))

    # --- what is already there --------------------------------------------------------------

    def is_done(self, stage: StageName) -> bool:
        """Whether a stage is finished, with the settings of this launch.

        Raises:
            ConfigError: it was finished with other settings.
        """
        return self.folder.is_done(stage, self.config.model_dump(mode="json"))

    def mark_done(self, stage: StageName, **facts: Any) -> None:
        """Say that a stage is finished, and what it left. Collective: all ranks must call."""
        if self.world.is_main:
            self.folder.mark_done(stage, self.config.model_dump(mode="json"), **facts)
        self.world.gather(None, f"finishing stage '{stage}'")

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
