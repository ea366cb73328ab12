"""The third stage: the checkpoint that pruning chose becomes a compact model."""

from __future__ import annotations

from dsprune.errors import ConfigError
from dsprune.run.exporting import export
from dsprune.run.stages.base import Stage

__all__ = ["ConsolidateStage"]


class ConsolidateStage(Stage):
    """Exports what pruning left."""

    name = "consolidate"

    def run(self) -> None:
        context, folder = self.context, self.context.folder
        if not folder.facts("prune"):
            raise ConfigError(f"stage 'prune' is not finished in {folder}: run it first")
        model = folder.model_of("consolidate")
        export(folder.chosen_checkpoint("prune"), model, context.world, context.stop)
        context.mark_done("consolidate", model=str(model))
