"""Where each rank is, so that a hang explains itself.

The training code notes its place (stage, step, phase, open collective) in memory, which costs a microsecond; a thread
of each rank writes it to the run folder every few seconds. A rank that was stopped or died leaves a heartbeat that
grows old, one that waits for it leaves the name of the collective that is open. Whoever reads the heartbeats, another
rank after a time-out or a person with `dsprune status`, can say who is missing, where, and since when.

The thread also writes the stacks of its process when asked to: a rank that hangs in a collective still can.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsprune.files import read_json, write_json
from dsprune.run_folder import RunFolder

__all__ = [
    "INTERVAL_SECONDS",
    "STALE_SECONDS",
    "Beat",
    "Heartbeat",
    "Place",
    "Pulse",
    "ask_for_stacks",
    "describe_ranks",
    "pulse",
    "read_beats",
    "suspects",
    "wait_for_stacks",
]

INTERVAL_SECONDS = 5.0
"""Between two heartbeats of a rank."""
STALE_SECONDS = 2 * INTERVAL_SECONDS
"""Age at which a heartbeat says that its rank is stopped, hung as a whole, or gone."""
STACKS_SIGNAL = signal.SIGQUIT
"""Makes a rank write the stacks of all its threads, whatever it is doing."""


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        stage: under way.
        step: optimizer steps of it that are done.
        phase: what it does: forward, backward, engine step, evaluating, ...
        collective: name of the collective that is open; None while it computes.
        since: when the last two changed, in seconds since 1970.
    """

    stage: str | None = None
    step: int = 0
    phase: str = "starting"
    collective: str | None = None
    since: float = 0.0


class Pulse:
    """The place of this process, noted by the code that is there."""

    def __init__(self) -> None:
        self.place = Place()

    def at(self, *, stage: str | None = None, step: int | None = None, phase: str | None = None) -> None:
        """Note where the main thread is; what is left out stays."""
        now = self.place
        self.place = Place(
            now.stage if stage is None else stage,
            now.step if step is None else step,
            now.phase if phase is None else phase,
            now.collective,
            time.time(),
        )

    @contextmanager
    def waiting(self, collective: str) -> Iterator[None]:
        """While inside, this rank is in a collective; one that fails stays noted, for whoever explains it."""
        before = self.place
        self.place = replace(before, collective=collective, since=time.time())
        yield
        self.place = replace(before, since=time.time())


pulse = Pulse()
"""Of this process: a process is at one place at a time."""


@dataclass(frozen=True)
class Beat:
    """What a rank last wrote of itself."""

    rank: int
    host: str
    pid: int
    written: float
    place: Place

    def age(self, now: float) -> float:
        """Seconds since it was written."""
        return max(0.0, now - self.written)

    def where(self) -> str:
        """Stage, step and phase, in words."""
        place = self.place
        return f"{place.stage} step {place.step}, {place.phase}" if place.stage else place.phase


class Heartbeat:
    """Writes this rank's place every few seconds, from a thread of its own. A context manager.

    Args:
        folder: of the run.
        rank: of this process.
        also: called at every beat: rank 0 brings status.json up to date.
    """

    def __init__(self, folder: RunFolder, rank: int, also: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.rank = rank
        self.also = also
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._stacks: Any = None
        self._answered = 0.0

    def __enter__(self) -> Heartbeat:
        path = self.folder.stacks(self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.folder.heartbeats.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("w", encoding="utf-8")
        self._answered = time.time()
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=INTERVAL_SECONDS)
        faulthandler.unregister(STACKS_SIGNAL)
        self._stacks.close()

    def beat(self) -> None:
        """Write where this rank is."""
        beat = Beat(self.rank, socket.gethostname(), os.getpid(), time.time(), pulse.place)
        write_json(self.folder.heartbeat(self.rank), asdict(beat), sync=False)

    def dump_stacks(self, error: BaseException | None = None) -> None:
        """Write what every thread of this process is doing, and where an error came from that has left that place."""
        self._stacks.write(f"--- rank {self.rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}, {pulse.place}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.writelines(traceback.format_exception(error) if error is not None else ())
        self._stacks.flush()

    def _run(self) -> None:
        while not self._over.wait(INTERVAL_SECONDS):
            try:
                self.beat()
                self.also()
                self._answer()
            except OSError:
                # A folder that cannot be written is told where results are written; a heartbeat is no result, and its
                # absence is what a reader reports.
                continue

    def _answer(self) -> None:
        """Write stacks if somebody asked since the last time."""
        asked = stacks_asked(self.folder)
        if asked > self._answered:
            self._answered = asked
            self.dump_stacks()


def ask_for_stacks(folder: RunFolder) -> None:
    """Make every rank that still beats write its stacks, wherever it runs.

    Raises:
        OSError: the folder cannot be written.
    """
    request = folder.stacks_request
    request.parent.mkdir(parents=True, exist_ok=True)
    request.touch()


def wait_for_stacks(folder: RunFolder) -> list[Path]:
    """Ask all ranks for their stacks, and wait for those that answer; the files of those that did.

    Raises:
        OSError: the folder cannot be written.
    """
    ranks = [beat.rank for beat in read_beats(folder)]
    ask_for_stacks(folder)
    asked, deadline = stacks_asked(folder), time.monotonic() + 2 * INTERVAL_SECONDS
    while True:
        answered = [path for rank in ranks if _written_since(path := folder.stacks(rank), asked)]
        if len(answered) == len(ranks) or time.monotonic() > deadline:
            return answered
        time.sleep(0.2)


def _written_since(path: Path, moment: float) -> bool:
    try:
        return path.stat().st_mtime > moment
    except OSError:
        return False


def stacks_asked(folder: RunFolder) -> float:
    """When stacks were last asked for, in seconds since 1970; 0 if never."""
    try:
        return folder.stacks_request.stat().st_mtime
    except OSError:
        return 0.0


def read_beats(folder: RunFolder) -> list[Beat]:
    """The last heartbeat of every rank, by rank; one that cannot be read is left out."""
    beats = []
    for path in folder.all_heartbeats():
        try:
            facts = read_json(path)
            beats.append(Beat(**{**facts, "place": Place(**facts["place"])}))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(beats, key=lambda beat: beat.rank)


def suspects(beats: Sequence[Beat], now: float) -> list[Beat]:
    """The ranks that the others wait for.

    Those whose heartbeat is old; if there are none, those that are in no collective while others are; if there are
    none either, those that are behind the rest.
    """
    old = [beat for beat in beats if beat.age(now) > STALE_SECONDS]
    if old:
        return old
    waiting = [beat for beat in beats if beat.place.collective is not None]
    busy = [beat for beat in beats if beat.place.collective is None]
    if waiting and busy:
        return busy
    furthest = max((beat.place.step for beat in beats), default=0)
    return [beat for beat in beats if beat.place.step < furthest]


def describe_ranks(beats: Sequence[Beat], now: float, *, patience: float = 0.0) -> str:
    """Who is missing, where, and what the others wait in since when; empty where there is nothing to say.

    Args:
        beats: of all ranks.
        now: seconds since 1970.
        patience: seconds that a rank may wait, or be silent, before there is anything to say.
    """
    missing = suspects(beats, now)
    waiting = [beat for beat in beats if beat.place.collective is not None and beat not in missing]
    waited = [now - beat.place.since for beat in waiting] + [beat.age(now) for beat in beats]
    if max(waited, default=0.0) < patience:
        return ""
    words = [_missing(beat, now) for beat in missing[:4]]
    others = [beat for beat in beats if beat not in missing and beat not in waiting]
    if len(missing) > 4:
        words.append(f"and {len(missing) - 4} more")
    if waiting:
        longest = min(waiting, key=lambda beat: beat.place.since)
        count = f"{len(waiting)} rank(s) wait" if len(waiting) > 1 else f"rank {longest.rank} waits"
        words.append(
            f"{count} in '{longest.place.collective}' ({longest.where()}) since {_ago(now - longest.place.since)}"
        )
    if missing and others:
        count = f"{len(others)} rank(s) are" if len(others) > 1 else f"rank {others[0].rank} is"
        words.append(f"{count} at {others[0].where()} since {_ago(now - others[0].place.since)}")
    return "; ".join(words)


def _missing(beat: Beat, now: float) -> str:
    who = f"rank {beat.rank} (process {beat.pid} on {beat.host})"
    inside = f", in '{beat.place.collective}'" if beat.place.collective is not None else ""
    if beat.age(now) > STALE_SECONDS:
        return f"{who} was last heard of {_ago(beat.age(now))} ago, at {beat.where()}{inside}"
    return f"{who} is at {beat.where()}{inside} since {_ago(now - beat.place.since)}"


def _ago(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{max(0.0, seconds):.0f} s"
