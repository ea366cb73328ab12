"""What a latency table holds, how it is read, and what is refused in one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from dsprune.errors import ConfigError, OutputError
from dsprune.files import first_line, read_json, write_json
from dsprune.structure.latency.curves import Matrix, monotone
from dsprune.structure.latency.identity import ModelIdentity, differences
from dsprune.structure.spaces import Structure

__all__ = ["Conditions", "LatencyTable", "PartTimes", "WidthTime", "matrix"]

FORMAT: Literal[1] = 1
SIGNIFICANT = 3.0
"""A fall by more than so many times the noise is told; a smaller one is smoothed and not worth a line."""
MEND = "measure one here (dsprune latency), or set latency.allow_foreign=true to use it knowingly"

Milliseconds = FiniteFloat
Size = Annotated[int, Field(ge=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Conditions(_Record):
    """What the times of a table hold for."""

    device: str
    """Name of the GPU, or of the CPU."""
    dtype: str
    batch: Size
    """Sequences of a forward pass."""
    length: Size
    """Tokens of a sequence; an encoder-decoder reads and writes so many."""
    threads: int = Field(ge=0)
    """CPU threads of torch; 0 on a GPU."""
    runtime: str
    """What ran the model: torch, or torch.compile."""
    torch: str

    def differences(self, other: Conditions) -> list[str]:
        """What is otherwise elsewhere, these conditions first. Another torch is another time, but no other table."""
        ours, theirs = (conditions.model_dump(exclude={"torch"}) for conditions in (self, other))
        return differences(ours, theirs)


class WidthTime(_Record):
    """Time of one attention whose heads lost dimensions, at the dense hidden width."""

    heads: Size
    """Live heads, or groups of them."""
    queries: int
    """Query dimensions that these keep, those that share a key counted once."""
    values: int
    """Value dimensions that they keep."""
    widest: Size
    """The most that one head keeps of either."""
    ms: Milliseconds


class PartTimes(_Record):
    """Times of sublayers that are alike, one of them alone: with its norm, without what stays."""

    kind: Literal["attn", "ffn"]
    units: tuple[Size, ...]
    """Measured numbers of whole heads (or groups), or of neurons; the last is the dense model's."""
    ms: tuple[tuple[Milliseconds, ...], ...]
    """By number of units, and then by hidden width."""
    widths: tuple[WidthTime, ...] = ()


class LatencyTable(_Record):
    """Measured milliseconds of one dense model's parts, in one place."""

    format: Literal[1] = FORMAT
    conditions: Conditions
    model: ModelIdentity
    rounds: Size
    """How often each point was measured; times are medians."""
    noise: float = Field(ge=0)
    """Typical error of a median, as a share of it."""
    whole: Milliseconds = Field(gt=0)
    """The dense model, measured among the points."""
    hidden: tuple[Size, ...]
    """Measured widths of the residual stream; the last is the dense model's."""
    stays: tuple[Milliseconds, ...]
    """By hidden width, what no sublayer holds: embeddings, final norm, pooler, head."""
    idle: tuple[Milliseconds, ...]
    """By hidden width, a sublayer without units that keeps its output bias and its norm."""
    parts: dict[str, PartTimes]

    @model_validator(mode="after")
    def _is_whole(self) -> LatencyTable:
        mistakes = [
            f"{name} has {len(row)} times for {len(self.hidden)} hidden widths"
            for name, row in self._rows()
            if len(row) != len(self.hidden)
        ]
        for name, part in self.parts.items():
            if len(part.ms) != len(part.units):
                mistakes.append(f"parts.{name}.ms has {len(part.ms)} rows for {len(part.units)} numbers of units")
        places = {"hidden": self.hidden, **{f"parts.{name}.units": part.units for name, part in self.parts.items()}}
        mistakes += [f"{name} does not rise" for name, sizes in places.items() if list(sizes) != sorted(set(sizes))]
        mistakes += [f"{name} is empty" for name, sizes in places.items() if not sizes]
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _rows(self) -> list[tuple[str, tuple[float, ...]]]:
        rows = [(f"parts.{name}.ms", row) for name, part in self.parts.items() for row in part.ms]
        return [("stays", self.stays), ("idle", self.idle), *rows]

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            ConfigError: no such file, not a table, or one with holes; every mistake, in one line each.
        """
        try:
            content = read_json(Path(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the latency table {path}: {first_line(error)}") from error
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(*(f"latency table {path}: {_mistake(item)}" for item in error.errors())) from error

    def save(self, path: str | Path) -> None:
        """Write the table as JSON.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            write_json(Path(path), self.model_dump())
        except OSError as error:
            raise OutputError(f"cannot write the latency table {path}: {error.strerror}") from error

    def check_model(self, structure: Structure, path: str | Path) -> None:
        """Refuse a table whose times cannot be read for a model, whatever is allowed.

        Raises:
            ConfigError: naming what differs.
        """
        ours = ModelIdentity.of(structure)
        sized = {"hidden", "heads", "groups", "head_dim", "ffn", "family"}
        unlike = differences(self.model.model_dump(include=sized), ours.model_dump(include=sized))
        if unlike:
            raise ConfigError(
                f"latency table {path} is of another model ({'; '.join(unlike)}): measure one of this model"
            )

    def check(self, structure: Structure, here: Conditions, path: str | Path) -> None:
        """Refuse a table that was not measured on this model, in this place.

        Raises:
            ConfigError: naming all that differs, the table's value first.
        """
        self.check_model(structure, path)
        mistakes = []
        if unlike := self.model.differences(ModelIdentity.of(structure)):
            mistakes.append(f"latency table {path} is of another model ({'; '.join(unlike)}): {MEND}")
        if unlike := self.conditions.differences(here):
            mistakes.append(f"latency table {path} was measured elsewhere ({'; '.join(unlike)}): {MEND}")
        if mistakes:
            raise ConfigError(*mistakes)

    def smoothed(self) -> list[str]:
        """What in the table falls by more than noise though a size grows, and is smoothed when it is read: a line for
        each part."""
        lines = []
        for name, part in self.parts.items():
            times = matrix(part)
            change = np.abs(monotone(times) - times)
            worst = np.unravel_index(int(change.argmax()), change.shape)
            if change[worst] > SIGNIFICANT * self.noise * max(times[worst], self.stays[-1]):
                lines.append(
                    f"{name} at {part.units[worst[0]]:,} units and hidden {self.hidden[worst[1]]:,}: "
                    f"{times[worst]:.3f} ms measured, {monotone(times)[worst]:.3f} ms used: a larger size took less"
                )
        return lines


def matrix(part: PartTimes) -> Matrix:
    """Times of a part, [units, hidden]; a difference of times that came out below zero is zero."""
    return np.asarray(part.ms, dtype=np.float64).clip(min=0)


def _mistake(item: object) -> str:
    """One of pydantic's errors, as what is wrong where."""
    facts: dict[str, object] = dict(item)  # type: ignore[call-overload]
    where = ".".join(str(part) for part in facts["loc"])  # type: ignore[attr-defined]
    what = str(facts["msg"]).removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
