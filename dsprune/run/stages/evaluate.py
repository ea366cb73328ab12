"""The last stage: dense and compact model side by side."""

from __future__ import annotations

from dsprune.run.reporting.report import write_report
from dsprune.run.stages.base import Stage

__all__ = ["EvaluateStage"]


class EvaluateStage(Stage):
    """Writes the report."""

    name = "evaluate"

    def run(self) -> None:
        write_report(self.context)
        self.context.mark_done("evaluate")
