"""One launch in a run folder: locked against others, its status on record, every ending told to all ranks."""

from __future__ import annotations

import errno
from types import TracebackType

import dsprune
from dsprune.config import RunConfig
from dsprune.engine.learning.batches import Batches
from dsprune.engine.ranks.pulse import Heartbeat, ask_for_stacks
from dsprune.engine.ranks.stop import Stop, seconds_left
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.operators import build_operators
from dsprune.errors import OutputError, Preempted
from dsprune.files import write_json
from dsprune.run.context import RunContext
from dsprune.run.journal import Journal
from dsprune.run.models import StoredModels
from dsprune.run.preflight import Preflight, hold_to_time
from dsprune.run.provenance import collect_provenance
from dsprune.run.rehearsal import rehearse
from dsprune.run.stages.table import STAGE_CLASSES, run_stage
from dsprune.run.status import Failures, RunLock, Status, lost_a_peer
from dsprune.run_folder import RunFolder

__all__ = ["Session"]

DISK_TROUBLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
    | {errno.ENOENT, errno.ENOTDIR}
)
"""What the system says where a folder cannot be written any more, which is no bug of ours."""


class Session:
    """Holds the run folder while stages run. A context manager; entering is collective.

    Args:
        config: checked configuration.
        world: the ranks.
        stop: listening already.

    Raises:
        OutputError: the folder cannot be written, or another launch is at work in it.
    """

    def __init__(self, config: RunConfig, world: World, stop: Stop) -> None:
        self.config = config
        self.world = world
        self.stop = stop
        self.folder = RunFolder(config.output)
        self.status = Status(self.folder, active=world.is_main)
        self.failures = Failures(self.folder, world.rank)
        self._lock = RunLock(self.folder)
        self._heartbeat = Heartbeat(self.folder, world.rank, also=lambda: self.status.refresh())

    def __enter__(self) -> Session:
        with self.world.together("opening the run folder"):
            if self.world.is_main:
                try:
                    self.folder.root.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise OutputError(f"cannot write to the run folder {self.folder}: {error.strerror}") from error
                self._lock.take()
                self.failures.clear()
                for path in self.folder.all_heartbeats():
                    path.unlink(missing_ok=True)
        cluster = self.config.cluster
        seconds = seconds_left(cluster.time_limit_minutes, cluster.margin_minutes)
        self.stop.watch(self.folder.stop if self.world.is_main else None, seconds=seconds)
        self._heartbeat.__enter__()
        return self

    def run_stages(self, findings: Preflight) -> None:
        """Load the data and run the stages of this launch. Collective: all ranks must call.

        Args:
            findings: of `preflight`.

        Raises:
            DspruneError: on every rank, whichever rank it happened on.
        """
        context = self._open(hold_to_time(self.config, findings, self.world))
        for stage in self.config.stages:
            STAGE_CLASSES[stage](context).check()
        journal = context.journal
        journal.say(
            f"dsprune {dsprune.__version__}: {self.world.size} rank(s) on {self.world.device.type}, run folder "
            f"{self.folder}"
        )
        for note in dict.fromkeys((*findings.student_ds.notes, *findings.teacher_ds.notes)):
            journal.say(note)
        rehearse(context)
        for stage in self.config.stages:
            run_stage(context, stage)
        journal.close()

    def _open(self, findings: Preflight) -> RunContext:
        """Load the data, and write down what is about to run. Collective: all ranks must call."""
        world, config = self.world, self.config
        with world.together("loading the data"):
            data = findings.task.load(findings.tokenizer, vocab_size=findings.vocab_size, progress=world.is_main)
        with world.together("opening the journal"):
            journal = Journal(config, active=world.is_main)
            if world.is_main:
                write_json(self.folder.config, config.model_dump(mode="json"))
        with world.together("recording where model and data came from"):
            provenance = world.broadcast(collect_provenance(config, data) if world.is_main else None)
            if world.is_main:
                write_json(self.folder.provenance, provenance.facts)
        with world.together("compiling DeepSpeed's operators"):
            build_operators(findings.student_ds, findings.teacher_ds, say=journal.say)
        return RunContext(
            config=config,
            findings=findings,
            data=data,
            batches=Batches(data.train, findings.batch, world, config.seed),
            models=StoredModels(config, findings),
            world=world,
            folder=self.folder,
            status=self.status,
            journal=journal,
            stop=self.stop,
            provenance=provenance,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            told = None if error is None else self._told(error)
            self._heartbeat.__exit__()
            if told is None:
                self.status.write("done")
                return
            self.status.ended(told)
            if isinstance(told, Preempted):
                self.stop.consume()
            if told is not error:
                raise told from error
        finally:
            self._lock.release()

    def _told(self, error: BaseException) -> BaseException:
        """The error that this rank ends with: its own, which the others learn of, or that of a rank that is gone."""
        where = f"{self.status.stage or 'start'} step {self.status.step}"
        if lost_a_peer(error):
            assert isinstance(error, Exception)
            self._heartbeat.beat()
            self._heartbeat.dump_stacks(error)
            ask_for_stacks(self.folder)
            return self.failures.explain(error, where)
        told: BaseException = error
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            told = OutputError(f"{where}: {error.strerror}: {error.filename or self.folder}")
        if not isinstance(error, Preempted):
            self.failures.report(told)
        return told
