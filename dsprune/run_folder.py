"""THE layout of a run: its stages, and every path and file name in its folder. Nobody else spells them.

    RUN/config.json, provenance.json        what was asked for, and where model and data came from
    RUN/metrics.jsonl, tensorboard/         how training went
    RUN/status.json, LOCK, STOP             how it stands, who is at work in it, and the wish that it stop
    RUN/failures/, heartbeats/, stacks/     what ranks had to say, where each is, and where it hung
    RUN/STAGE/done.json                     a stage is finished: with which settings, and what it left
    RUN/STAGE/checkpoints/step-N            committed checkpoints of a stage that trains
    RUN/teacher/model, compact, recovered, sparse    the models that stages leave
    RUN/latency.json                        milliseconds of the model's parts, where a speedup was asked for
    RUN/report.json, report.png             dense and compact side by side

Pure standard library: a command that only reads a run imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dsprune.errors import CheckpointError, ConfigError
from dsprune.files import read_json, write_json

__all__ = [
    "CHECKPOINT_PREFIX",
    "DESCRIPTION",
    "FIGURES",
    "MANIFEST",
    "REPLICA",
    "SELECTION",
    "STAGES",
    "STATE",
    "STATE_TENSORS",
    "TRAINING_STAGES",
    "VERIFICATION",
    "RunFolder",
    "StageName",
    "StageSpec",
    "best_scored",
    "checkpoint_name",
    "is_checkpoint",
]

StageName = Literal["teacher", "prune", "consolidate", "recover", "blocks", "evaluate"]

CHECKPOINT_PREFIX = "step-"
"""Of a committed checkpoint's name."""
MANIFEST = "MANIFEST.json"
"""Written last into a checkpoint: with it, the checkpoint is complete."""
DESCRIPTION = "model"
"""Folder in a checkpoint that describes the model whose weights it holds: configuration, tokenizer, code."""
STATE, STATE_TENSORS, REPLICA = "state.json", "state.safetensors", "replica.safetensors"
"""In a checkpoint: where training stood, as values and as tensors, and what every rank holds alike (gates)."""
SELECTION, FIGURES, VERIFICATION = "selection.safetensors", "figures.json", "verify.safetensors"
"""In a checkpoint: the final gates, what is said of them, and a batch on which the exported model is compared."""


@dataclass(frozen=True)
class StageSpec:
    """One stage of a run.

    Attributes:
        name: as in `stages`, and of its folder in the run.
        help: what it does, for people.
        settings: tables of the recipe that decide what it produces, beside those that decide every stage.
        needs: stages that must be done before it; those that leave a model may be replaced by one that is given.
        model: folder of the model that it leaves, within the run; None where it leaves none.
        trains: whether it has checkpoints.
        exports: which of its checkpoints becomes the model; gates are not averaged over, so where they are learned
            it is the last.
    """

    name: StageName
    help: str
    settings: tuple[str, ...]
    needs: tuple[StageName, ...] = ()
    model: str | None = None
    trains: bool = False
    exports: Literal["best", "last"] = "last"


COMMON_SETTINGS = ("seed", "model", "task", "data", "batch")
"""Tables of the recipe that decide what every stage produces."""
_PRUNING = ("teacher", "method", "prune", "shape", "distill")
STAGES: Mapping[StageName, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec(
            "teacher",
            "fine-tune the dense model on the task; skipped with teacher.path=FOLDER",
            settings=("teacher",),
            model="teacher/model",
            trains=True,
            exports="best",
        ),
        StageSpec(
            "prune",
            "learn what to remove, the teacher distilling",
            settings=_PRUNING,
            needs=("teacher",),
            trains=True,
        ),
        StageSpec(
            "consolidate",
            "ZeRO shards + final gates -> a compact Hugging Face folder",
            settings=_PRUNING,
            needs=("prune",),
            model="compact",
        ),
        StageSpec(
            "recover",
            "the compact model trains on, the teacher still distilling",
            settings=(*_PRUNING, "recover"),
            needs=("teacher", "consolidate"),
            model="recovered",
            trains=True,
            exports="best",
        ),
        StageSpec(
            "blocks",
            "remove blocks of the compact model's matrices; off unless blocks.duration is given",
            settings=(*_PRUNING, "recover", "blocks"),
            needs=("consolidate",),
            model="sparse",
            trains=True,
        ),
        StageSpec(
            "evaluate",
            "dense and compact side by side: metric, size, latency",
            settings=(*_PRUNING, "recover", "blocks", "eval"),
            needs=("teacher", "consolidate"),
        ),
    )
}
"""Every stage, in the order in which they run."""
assert tuple(STAGES) == get_args(StageName)
TRAINING_STAGES: tuple[StageName, ...] = tuple(name for name, spec in STAGES.items() if spec.trains)
"""Stages that train, and have checkpoints."""
COMPACT_STAGES: tuple[StageName, ...] = tuple(n for n, spec in STAGES.items() if spec.model and n != "teacher")
"""Stages that leave a compact model, each in place of the one before."""


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after so many optimizer steps; names sort as steps do."""
    return f"{CHECKPOINT_PREFIX}{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has a checkpoint's final name: `step-N`, and nothing behind it."""
    return path.name.startswith(CHECKPOINT_PREFIX) and not path.suffix


class RunFolder:
    """Paths and facts of one run.

    Args:
        root: the folder, which need not be there yet.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def __fspath__(self) -> str:
        return str(self.root)

    # --- files of the whole run -------------------------------------------------------------

    @property
    def config(self) -> Path:
        """What was asked for: the whole configuration."""
        return self.root / "config.json"

    @property
    def provenance(self) -> Path:
        """Where model and data came from."""
        return self.root / "provenance.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, as training went."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def status(self) -> Path:
        """How the run stands; only training writes it."""
        return self.root / "status.json"

    @property
    def lock(self) -> Path:
        """Names the launch that is at work here."""
        return self.root / "LOCK"

    @property
    def stop(self) -> Path:
        """A file that asks the run to stop."""
        return self.root / "STOP"

    @property
    def numerics(self) -> Path:
        """Details of the last numbers that were not finite."""
        return self.root / "numerics.json"

    @property
    def failures(self) -> Path:
        """Folder of the last words of failed ranks."""
        return self.root / "failures"

    def failure(self, rank: int) -> Path:
        """Last words of one rank."""
        return self.failures / f"rank{rank}.json"

    def all_failures(self) -> list[Path]:
        """Last words that are there."""
        return sorted(self.failures.glob("rank*.json"))

    @property
    def heartbeats(self) -> Path:
        """Folder of where each rank is."""
        return self.root / "heartbeats"

    def heartbeat(self, rank: int) -> Path:
        """Where one rank is."""
        return self.heartbeats / f"rank{rank}.json"

    def all_heartbeats(self) -> list[Path]:
        """Heartbeats that are there."""
        return sorted(self.heartbeats.glob("rank*.json"))

    def stacks(self, rank: int) -> Path:
        """Stacks of one rank's threads, as it was asked for them or hung."""
        return self.root / "stacks" / f"rank{rank}.txt"

    @property
    def stacks_request(self) -> Path:
        """Touched by whoever wants the stacks of all ranks."""
        return self.root / "stacks" / "REQUEST"

    @property
    def latency_table(self) -> Path:
        """Milliseconds of the dense model's parts, as this run measured them."""
        return self.root / "latency.json"

    @property
    def report(self) -> Path:
        """Dense and compact side by side, for programs."""
        return self.root / "report.json"

    @property
    def picture(self) -> Path:
        """The same for people."""
        return self.root / "report.png"

    # --- stages -----------------------------------------------------------------------------

    def done_file(self, stage: StageName) -> Path:
        """What says that a stage is finished."""
        return self.root / stage / "done.json"

    @property
    def given_teacher(self) -> Path:
        """What a teacher that was given scored before pruning."""
        return self.root / "teacher" / "given.json"

    def checkpoints(self, stage: StageName) -> Path:
        """Folder of a stage's checkpoints."""
        return self.root / stage / "checkpoints"

    def model_of(self, stage: StageName) -> Path:
        """Folder of the model that a stage leaves, whether it is there yet or not.

        Raises:
            ConfigError: the stage leaves none.
        """
        model = STAGES[stage].model
        if model is None:
            leaving = ", ".join(name for name, spec in STAGES.items() if spec.model)
            raise ConfigError(f"stage '{stage}' leaves no model; {leaving} do")
        return self.root / model

    def has_model(self, stage: StageName) -> bool:
        """Whether the model of a stage is there, whole: a folder gets its name when it is."""
        return (self.model_of(stage) / "config.json").is_file()

    def last_model(self, *, before: StageName | None = None) -> Path | None:
        """The last compact model; None where nothing was consolidated.

        Args:
            before: look only at stages before this one.
        """
        names = COMPACT_STAGES if before is None else COMPACT_STAGES[: COMPACT_STAGES.index(before)]
        return next((self.model_of(name) for name in reversed(names) if self.has_model(name)), None)

    def newest_model(self) -> Path | None:
        """The last compact model, or where there is none the teacher; None where there is no model yet."""
        return self.last_model() or (self.model_of("teacher") if self.has_model("teacher") else None)

    # --- what is finished -------------------------------------------------------------------

    @staticmethod
    def settings(stage: StageName, config: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a configuration (as JSON values) that decides what a stage produces."""
        # How a batch is cut over ranks decides nothing.
        known = {**config, "batch": {"size": config["batch"]["size"]}}
        keys = (*COMMON_SETTINGS, *STAGES[stage].settings)
        timed = {}
        if "prune" in keys and config["prune"].get("speedup") is not None:
            # What a speedup is counted on decides what is pruned; how long measuring may take does not.
            timed = {key: value for key, value in config["latency"].items() if key != "minutes"}
            timed |= {key: config["eval"][key] for key in ("bench_batch", "bench_length")}
        return {key: known[key] for key in keys} | ({"latency": timed} if timed else {})

    def is_done(self, stage: StageName, config: Mapping[str, Any]) -> bool:
        """Whether a stage is finished, with these settings.

        Raises:
            ConfigError: it was finished with other settings.
        """
        facts = self.facts(stage)
        if not facts:
            return False
        done, ours = facts["settings"], self.settings(stage, config)
        changed = [key for key in ours if done.get(key) != ours[key]]
        if changed:
            raise ConfigError(
                f"stage '{stage}' in {self.root} was finished with other settings of {', '.join(changed)}: "
                f"choose another output=, or remove {self.root / stage} to redo it"
            )
        return True

    def mark_done(self, stage: StageName, config: Mapping[str, Any], **facts: Any) -> None:
        """Say that a stage is finished, with these settings, and what it left. On one rank."""
        path = self.done_file(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": self.settings(stage, config), **facts})

    def facts(self, stage: StageName) -> dict[str, Any]:
        """What a finished stage left: checkpoint, metrics, settings; empty where it is not finished."""
        path = self.done_file(stage)
        facts: dict[str, Any] = read_json(path) if path.exists() else {}
        return facts

    # --- checkpoints ------------------------------------------------------------------------

    def committed(self, stage: StageName) -> list[Path]:
        """Checkpoints of a stage that have their manifest and final name, oldest first."""
        return sorted(p.parent for p in self.checkpoints(stage).glob(f"*/{MANIFEST}") if is_checkpoint(p.parent))

    def chosen_checkpoint(self, stage: StageName) -> Path:
        """The checkpoint that the run exports: of a finished stage the one it chose; else the best, or the newest.

        Raises:
            CheckpointError: nothing was completed.
        """
        committed = self.committed(stage)
        chosen = self.facts(stage).get("checkpoint")
        # By name: the run's folder may have been moved since.
        named = [path for path in committed if chosen is not None and path.name == Path(chosen).name]
        if named:
            return named[0]
        if not committed:
            raise CheckpointError(self._nothing(stage))
        return (best_scored(committed) if STAGES[stage].exports == "best" else None) or committed[-1]

    def _nothing(self, stage: StageName) -> str:
        folder = self.checkpoints(stage)
        there = sorted(path.name for path in folder.glob(f"{CHECKPOINT_PREFIX}*")) if folder.is_dir() else []
        what = f"holds only incomplete saves ({', '.join(there)})" if there else "holds no checkpoint"
        return f"{folder} {what}: let stage '{stage}' save one first"


def best_scored(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the highest score, of several the newest; None where none has one.

    One whose manifest cannot be read has no score here; whoever opens it is told why.
    """
    scored = []
    for path in checkpoints:
        try:
            score = read_json(path / MANIFEST).get("score")
        except (OSError, ValueError, AttributeError):
            continue
        if score is not None:
            scored.append((float(score), path.name, path))
    return max(scored)[2] if scored else None
