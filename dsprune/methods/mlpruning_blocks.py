"""MLPruning, step 2: blocks of the matrices that step 1 left (arXiv 2105.14636).

Every matrix of the compact model's layers is one group under learnable top-k; see `mlpruning.py` for the
rule and its sources. The teacher is the model of step 1. R is the share of its encoder that is stored,
biases and norms included; what the dense model lost in both steps is the product. Blocks at the edge of a
matrix that the block size does not divide reach beyond it and hold zeros there: no row comes back that step
1 removed, where the authors' code rounds the number of rows up and revives rows that had not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsprune.config import BlocksConfig
from dsprune.methods.base import Plan
from dsprune.methods.evidence import Evidence
from dsprune.methods.landing import land
from dsprune.methods.parts import Learned, Read, StartsFromWeights
from dsprune.methods.topk_groups import REACH, TopKGroups, adaptive_penalty
from dsprune.structure import BlockSelection, BlockStructure, block_magnitudes

__all__ = ["BlockPruning"]


class BlockPruning(Learned[BlockStructure], StartsFromWeights):
    """Learnable top-k of blocks, matrix by matrix.

    Args:
        structure: the matrices of the compact model.
        options: the `[blocks]` table.
        plan: length of the stage; its target is that of the table.

    Raises:
        ConfigError: a target that one block a matrix does not reach.
    """

    Options = BlocksConfig
    empty = "bias"

    def __init__(self, structure: BlockStructure, options: BlocksConfig, plan: Plan) -> None:
        super().__init__(structure, options, plan)
        self.options = options
        self._grids = structure.gate_shapes
        self.kinds = tuple(self._grids)
        self.groups = TopKGroups(
            {path: (1, rows * columns) for path, (rows, columns) in self._grids.items()},
            lr=options.scores_lr,
            warmup=options.warmup,
            total_steps=plan.total_steps,
            init=options.init,
        )
        if options.scores in ("uniform", "kaiming"):
            self.groups.draw(options.scores_scale if options.scores == "uniform" else 1.0, plan.seed)
        self._check_target()

    @classmethod
    def kinds_of(cls, options: Any) -> tuple[str, ...]:
        return ("block",)

    def begin(self, read: Read) -> None:
        if self.options.scores == "magnitude":
            magnitudes = block_magnitudes(self.structure, read)
            self.groups.begin({path: magnitude.view(1, -1) for path, magnitude in magnitudes.items()})

    def parameters(self) -> dict[str, Tensor]:
        return self.groups.parameters()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.groups.optimizer]

    def _as_grids(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {path: gate.view(self._grids[path]) for path, gate in gates.items()}

    def gates(self, step: int) -> dict[str, Tensor] | None:
        return self._as_grids(self.groups.gates())

    def evidence(self, step: int) -> Evidence:
        return "gradient"

    def learn(self, step: int, gates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
        super().learn(step, gates, seen)
        self.groups.set_rate(step)

    def penalty(self, step: int) -> Tensor | None:
        remaining = 1 - self.budget.sparsity(self.groups.shares())
        return adaptive_penalty(
            remaining, self.budget.share, strength=self.options.penalty, two_sided=self.options.two_sided
        )

    def evaluation_gates(self, step: int) -> dict[str, Tensor] | None:
        return self._as_grids(self.groups.hard_gates())

    def select(self) -> BlockSelection:
        gates = land(
            self.groups.hard_gates,
            self.budget,
            {path: score.detach() for path, score in self.groups.score.items()},
            reach=REACH,
        )
        return BlockSelection(self._as_grids(gates), self.options.shape)

    def _check_target(self) -> None:
        floor = self.budget.spent(self.groups.hard_gates(-REACH - self.options.init))
        rows, columns = self.options.shape
        self.budget.check(float(floor), f"one block of {rows} x {columns} stays in every matrix, which is {{}} at most")

    @torch.no_grad()
    def metrics(self, step: int) -> dict[str, float]:
        hard = self.budget.removed(self.groups.hard_gates())
        left = self.structure.parameters["encoder"] * (1 - hard)
        return {
            "sparsity/expected": float(self.budget.sparsity(self.groups.shares())),
            "sparsity/hard": hard,
            "sparsity/target": self.budget.target,
            "sparsity/of_dense": 1 - left / self.structure.dense["encoder"],
        }
