"""Every error that dsprune tells a user, each class with the exit code that scripts can act on.

A message is one line: what was given, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "ArchitectureError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DspruneError",
    "NumericsError",
    "OutputError",
    "PeerLostError",
    "Preempted",
]


class DspruneError(Exception):
    """Base of all errors that are told to the user in one line; 70 is a bug of ours."""

    exit_code: int = 70


class ConfigError(DspruneError):
    """A wrong recipe, override, ds_config, command line or environment. Exit code 64.

    Holds all mistakes that were found, so that a user mends them in one go.
    """

    exit_code = 64

    def __init__(self, *mistakes: str) -> None:
        self.mistakes = mistakes
        super().__init__("; ".join(mistakes))


class DataError(DspruneError):
    """Data that cannot be trained on: missing column, label out of range, broken file. Exit code 65."""

    exit_code = 65


class ArchitectureError(DspruneError):
    """A model that no family spec accounts for, or that does not fit the task. Exit code 65."""

    exit_code = 65


class NumericsError(DspruneError):
    """Losses, gates or weights that are not finite, or replicas that drifted apart. Exit code 66.

    `details` are what a person needs to find the cause: JSON values, written beside the run.
    """

    exit_code = 66

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = dict(details or {})


class PeerLostError(DspruneError):
    """Another rank is gone (killed, hung, its node down): start again, and the run goes on. Exit code 69."""

    exit_code = 69


class OutputError(DspruneError):
    """A folder that cannot be written or already holds something. Exit code 73."""

    exit_code = 73


class CheckpointError(DspruneError):
    """A checkpoint that is incomplete, damaged, or of another model. Exit code 74."""

    exit_code = 74


class Preempted(DspruneError):
    """The run was asked to stop and did, its state saved: start it again, and it goes on. Exit code 75."""

    exit_code = 75
