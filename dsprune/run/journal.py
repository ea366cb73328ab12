"""What a run writes while it trains: metrics.jsonl, TensorBoard, W&B, and a progress bar on rank 0."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsprune.config import RunConfig
from dsprune.errors import ConfigError, OutputError
from dsprune.run_folder import RunFolder

__all__ = ["Journal", "read_metrics"]

logger = logging.getLogger(__name__)


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Lines of a run's metrics; none where there is no such file."""
    path = run.metrics
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


class Journal:
    """Metrics of one run. On ranks other than the first it does nothing.

    Args:
        config: the run.
        active: whether this rank writes.

    Raises:
        ConfigError: W&B is asked for and not installed.
        OutputError: the run's folder cannot be written.
    """

    def __init__(self, config: RunConfig, *, active: bool) -> None:
        self.active = active
        self._bar: tqdm[Any] | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._offset: dict[str, int] = {}
        if not active:
            return
        self.run = RunFolder(config.output)
        try:
            self.run.root.mkdir(parents=True, exist_ok=True)
            self._file = self.run.metrics.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write to the run folder {self.run}: {error.strerror}") from error
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run.tensorboard))  # type: ignore[no-untyped-call]
        if config.log.wandb:
            self._wandb = self._start_wandb(config)

    @staticmethod
    def _start_wandb(config: RunConfig) -> Any:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("log.wandb = true and wandb is not installed: pip install wandb") from error
        name = Path(config.output).name
        return wandb.init(project=config.log.wandb_project, name=name, config=config.model_dump(mode="json"))

    def forget_after(self, stage: str, step: int) -> None:
        """Drop the lines of a stage past a step that training goes back to, so that no step stands twice."""
        if not self.active:
            return
        lines = read_metrics(self.run)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        if len(kept) == len(lines):
            return
        self._file.close()
        scratch = self.run.metrics.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        scratch.replace(self.run.metrics)
        self._file = self.run.metrics.open("a", encoding="utf-8")

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics at an optimizer step of a stage."""
        if not self.active:
            return
        self._file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if self._board is not None:
                self._board.add_scalar(f"{stage}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": value for name, value in metrics.items()} | {f"{stage}/step": step})

    def start_bar(self, stage: str, total: int, done: int) -> None:
        if self.active:
            self._bar = tqdm(total=total, initial=done, desc=f"{stage:<8}", unit="step", mininterval=1.0)

    def advance(self, note: Mapping[str, str] | None = None) -> None:
        if self._bar is not None:
            if note:
                self._bar.set_postfix(note, refresh=False)
            self._bar.update()

    def end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        self.end_bar()
        if self.active:
            self._file.close()
            if self._board is not None:
                self._board.close()
            if self._wandb is not None:
                self._wandb.finish()
