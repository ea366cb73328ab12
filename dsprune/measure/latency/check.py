"""How well a table predicts: random selections, predicted and then measured beside the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsprune.dtypes import torch_dtype
from dsprune.measure.bench import limit_threads
from dsprune.measure.latency.models import DenseModel
from dsprune.measure.latency.setting import Setting, Stopwatch, check_length, compiling
from dsprune.measure.tables import render_table
from dsprune.structure import CostModel, Empty, Selection, Structure, by_head, gate_shapes
from dsprune.structure.latency import LatencyCost, LatencyTable

__all__ = ["Case", "CheckReport", "check_table", "draw_gates"]

DENSITIES = (0.05, 0.8)
CASE_SECONDS = 5.0
LEAST_ROUNDS, MOST_ROUNDS = 3, 60
"""How long each selection is measured beside the dense model, in rounds of both; the median of their ratios counts."""
STYLES: dict[str, Empty] = {"units": "identity", "ragged": "bias"}
"""What is drawn in turn, and what an empty sublayer leaves: whole heads, neurons, sublayers and hidden dimensions, as
CoFi prunes; or query, value and FFN dimensions, as GRAIN does."""


@dataclass(frozen=True)
class Case:
    """One random selection; shares are of the dense model's time."""

    style: str
    density: float
    """Share of the encoder's parameters that is kept."""
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of what was measured; above 0 it is too slow."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class CheckReport:
    """All cases."""

    cases: tuple[Case, ...]

    def quantile(self, share: float) -> float:
        """Size of the error that a share of the cases does not exceed."""
        return float(np.quantile([abs(case.error) for case in self.cases], share))

    def render(self) -> str:
        """A row for each case, sparsest first, and what follows from them."""
        rows = [
            [
                case.style,
                f"{case.density:.1%}",
                f"{1 / case.predicted:.2f}x",
                f"{1 / case.measured:.2f}x",
                f"{case.error:+.1%}",
            ]
            for case in sorted(self.cases, key=lambda case: case.density)
        ]
        table = render_table(["selection", "density", "predicted", "measured", "time is off by"], rows, align="<>>>>")
        worst = max(self.cases, key=lambda case: abs(case.error))
        return (
            f"{table}\n\n{len(self.cases)} selections: median error {self.quantile(0.5):.1%}, 90th percentile "
            f"{self.quantile(0.9):.1%}, worst {worst.error:+.1%} ({worst.style}, density {worst.density:.1%})"
        )


def draw_gates(structure: Structure, style: str, density: float, seed: int) -> dict[str, Tensor]:
    """Random hard gates that keep about a share of the encoder's parameters.

    Every layer has odds of its own, as in pruned models; what a family cannot lose stays.

    Args:
        structure: of the dense model.
        style: of `STYLES`.
        density: share of the encoder's parameters to keep.
        seed: of the draw.
    """
    cost = CostModel(structure, empty=STYLES[style])
    order = _ranks(structure, style, torch.Generator().manual_seed(seed))
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        kept = 1 - float(cost.sparsity(_below(order, middle)))
        low, high = (middle, high) if kept < density else (low, middle)
    return _below(order, high)


def _ranks(structure: Structure, style: str, generator: torch.Generator) -> dict[str, Tensor]:
    """For each gate, the threshold from which on it is open: random, and shifted for each layer together."""
    shapes = gate_shapes(structure.sizes)
    kinds = ("head", "ffn_dim", "hidden", "attn", "ffn") if style == "units" else ("qk_dim", "vo_dim", "ffn_dim")
    ranks = {}
    for kind in kinds:
        if structure.family.refusal([kind]) is not None:
            continue
        shape = shapes[kind]
        own = torch.rand(shape, generator=generator)
        if kind in ("attn", "ffn"):
            own = own * 0.3  # few sublayers go as a whole
        elif kind == "hidden":
            own = own * 0.5
        else:
            own = own * (0.4 + 0.6 * torch.rand(shape[0], 1, generator=generator))
        if kind in ("qk_dim", "vo_dim"):
            heads = by_head(own, structure.sizes.num_groups)
            heads *= 0.3 + 0.7 * torch.rand(*heads.shape[:2], 1, generator=generator)
        ranks[kind] = own
    return ranks


def _below(ranks: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    gates = {kind: (own <= threshold).float() for kind, own in ranks.items()}
    if "hidden" in gates and not gates["hidden"].any():
        gates["hidden"][ranks["hidden"].argmin()] = 1
    return gates


def check_table(
    dense: DenseModel,
    table: LatencyTable,
    setting: Setting,
    *,
    cases: int = 30,
    progress: bool = False,
) -> CheckReport:
    """Predict and measure random selections of 5 to 80% density, both kinds in turn.

    Each is measured in turn with the dense model, and both figures are shares of that model's time: a machine that
    is slower than it was for the table does not count.

    Args:
        dense: the model of the table.
        table: measured for the setting.
        setting: where and on what.
        cases: how many selections.
        progress: show a bar on stderr.
    """
    device, structure = setting.place(), dense.structure
    kinds = [style for style in STYLES if _has(structure, style)]
    with limit_threads(setting.threads), torch.inference_mode(), compiling(setting):
        whole = dense.whole(device, torch_dtype(setting.dtype))
        check_length(whole, setting.length)
        watch = Stopwatch(setting, device, whole)
        whole = watch.ready(whole)
        found = []
        with tqdm(total=cases, desc="latency: check", disable=not progress) as bar:
            for number, density in enumerate(np.geomspace(*DENSITIES, cases)):
                style = kinds[number % len(kinds)]
                gates = draw_gates(structure, style, float(density), setting.seed + number)
                selection = Selection.from_gates(structure, gates, empty=STYLES[style])
                cost = LatencyCost(structure, table, empty=STYLES[style])
                kept = 1 - float(CostModel(structure, empty=STYLES[style]).sparsity(gates))
                model = watch.ready(dense.compact(selection, device, torch_dtype(setting.dtype)))
                measured = float(np.median(list(_ratios(watch, model, whole))))
                found.append(Case(style, kept, float(cost.milliseconds(gates)) / cost.dense, measured))
                bar.update()
    return CheckReport(tuple(found))


def _has(structure: Structure, style: str) -> bool:
    kinds = ["qk_dim", "vo_dim"] if style == "ragged" else ["head", "hidden"]
    return structure.family.refusal(kinds) is None


def _ratios(watch: Stopwatch, model: nn.Module, whole: nn.Module) -> Iterator[float]:
    """Time of a model as a share of the dense one's, in each round after the first; fast models have more rounds."""
    rounds = LEAST_ROUNDS
    for round_ in range(1 + MOST_ROUNDS):
        ours, theirs = watch.time(model), watch.time(whole)
        if round_:
            yield ours / theirs
        else:
            rounds = max(LEAST_ROUNDS, int(1e3 * CASE_SECONDS / (ours + theirs)))
        if round_ >= rounds:
            return
