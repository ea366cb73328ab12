"""Where and on what latency is measured, and the clock that measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsprune.consolidate.modeling_dsprune import device_name
from dsprune.errors import ConfigError
from dsprune.measure.bench import check_options, num_positions, random_inputs, wait
from dsprune.structure.latency import Conditions

__all__ = ["Setting", "Stopwatch", "check_length", "compiling"]

RUNTIMES = ("torch", "compile")
MANY = 100_000


@dataclass(frozen=True)
class Setting:
    """Where and on what to measure.

    Attributes:
        batch: sequences of a forward pass.
        length: tokens of a sequence.
        dtype: float32, bfloat16 or float16.
        device: `cpu` or `cuda[:N]`; by default a GPU if there is one.
        threads: CPU threads of torch; by default as many as it has now.
        runtime: torch or compile.
        minutes: how long the rounds may take; a few are made in any case.
        seed: of the token ids and of the order of the points.
    """

    batch: int = 32
    length: int = 128
    dtype: str = "float32"
    device: str | None = None
    threads: int | None = None
    runtime: str = "torch"
    minutes: float = 3.0
    seed: int = 0

    def place(self) -> torch.device:
        """The device, once everything that needs no model is known to be right.

        Raises:
            ConfigError: what is not, all of it.
        """
        mistakes = []
        if self.runtime not in RUNTIMES:
            mistakes.append(f"no runtime '{self.runtime}' to measure with: there are {', '.join(RUNTIMES)}")
        if self.minutes <= 0:
            mistakes.append(f"minutes is {self.minutes:g}: it must be more than 0")
        try:
            device = check_options([self.batch], self.length, self.dtype, self.device, 1, 0, self.threads)
        except ConfigError as error:
            raise ConfigError(*mistakes, *error.mistakes) from error
        if mistakes:
            raise ConfigError(*mistakes)
        return device

    def conditions(self, device: torch.device) -> Conditions:
        """What a table measured now holds for."""
        return Conditions(
            device=device_name(device),
            dtype=self.dtype,
            batch=self.batch,
            length=self.length,
            threads=(self.threads or torch.get_num_threads()) if device.type == "cpu" else 0,
            runtime=self.runtime,
            torch=torch.__version__,
        )


class Stopwatch:
    """Times forward passes of models, each in turn, on the same input.

    On one CPU thread the clock is that of the thread itself, which stands still while a neighbour has the core.

    Args:
        setting: where and on what.
        device: of it.
        model: any of the models, for the vocabulary.
    """

    def __init__(self, setting: Setting, device: torch.device, model: nn.Module) -> None:
        self.device, self.setting = device, setting
        self.inputs: dict[str, Tensor] = random_inputs(model, setting.batch, setting.length, setting.seed, device)
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock: Callable[[], float] = time.thread_time if alone else time.perf_counter

    def ready(self, model: nn.Module) -> nn.Module:
        """A model as the runtime runs it."""
        if self.setting.runtime == "torch":
            return model
        compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return compiled

    def time(self, model: nn.Module) -> float:
        """Milliseconds of one forward pass, until its last kernel is done."""
        wait(self.device)
        start = self.clock()
        model(**self.inputs)
        wait(self.device)
        return 1e3 * (self.clock() - start)


def check_length(model: nn.Module, length: int) -> None:
    """Refuse a length that a model has no positions for.

    Raises:
        ConfigError: it has not so many.
    """
    positions = num_positions(model)
    if positions is not None and length > positions:
        raise ConfigError(f"length {length} is more than the {positions} positions of the model: give a smaller one")


def compiling(setting: Setting) -> AbstractContextManager[Any]:
    """Let as many models be compiled as there are points: by default torch gives up after a few of one class."""
    if setting.runtime != "compile":
        return nullcontext()
    import torch._dynamo.config as config

    patched: AbstractContextManager[Any] = config.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY)
    return patched
