"""Measuring a latency table: many small models in turn, round after round, and the median of each."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dsprune.consolidate.compact import HEAD_MULTIPLE
from dsprune.dtypes import torch_dtype
from dsprune.errors import ConfigError
from dsprune.measure.bench import limit_threads
from dsprune.measure.latency.models import DenseModel
from dsprune.measure.latency.points import Point, make_selection, plan_points
from dsprune.measure.latency.setting import Setting, Stopwatch, check_length, compiling
from dsprune.structure import Structure
from dsprune.structure.latency import Conditions, LatencyTable, ModelIdentity, PartTimes, WidthTime, parts_of

__all__ = ["measure_table"]

LEAST_ROUNDS, GOOD_ROUNDS, MOST_ROUNDS = 3, 9, 60
GOOD_NOISE = 0.01
"""Rounds end when medians are as good as this, or the time is up; a few are made in any case."""
DEEP_SECONDS = 0.3
"""A point is measured in as many equal sublayers as a forward pass of the dense model has in this time."""


def measure_table(dense: DenseModel, setting: Setting, *, progress: bool = False) -> LatencyTable:
    """Measure what each part of a model takes at different sizes, here and now.

    Args:
        dense: the model; its weights do not matter.
        setting: where and on what.
        progress: show a bar on stderr.

    Raises:
        ConfigError: wrong options, a length that the model has no positions for, not enough GPU memory.
        ArchitectureError: a model that cannot be made smaller.
    """
    device, structure = setting.place(), dense.structure
    with limit_threads(setting.threads), torch.inference_mode(), compiling(setting):
        whole = dense.whole(device, torch_dtype(setting.dtype))
        check_length(whole, setting.length)
        watch = Stopwatch(setting, device, whole)
        whole = watch.ready(whole)
        depth = _depth(dense, watch, whole)
        points = plan_points(structure, HEAD_MULTIPLE)
        with tqdm(total=len(points), desc="latency: models", disable=not progress) as bar:
            models = {}
            for point in points:
                selection = make_selection(structure, point, depth)
                models[point] = watch.ready(dense.compact(selection, device, torch_dtype(setting.dtype)))
                bar.update()
        samples = _rounds(watch, {None: whole, **models}, progress)
        return _table(dense, setting.conditions(device), samples, depth)


def _depth(dense: DenseModel, watch: Stopwatch, whole: nn.Module) -> int:
    """In how many sublayers at once a point is measured: in many of a small model, whose layers take no time alone."""
    shortest = min(len(stack.layers) for stack in dense.structure.stacks)
    watch.time(whole)
    seconds = watch.time(whole) / 1e3
    return max(1, min(shortest, int(DEEP_SECONDS / max(seconds, 1e-9) * shortest)))


def _rounds(watch: Stopwatch, models: Mapping[Any, nn.Module], progress: bool) -> dict[Any, list[float]]:
    """Milliseconds of each model in each round, in a new order every time; the first round warms up."""
    samples: dict[Any, list[float]] = {key: [] for key in models}
    order, shuffle = list(models), random.Random(watch.setting.seed)
    began, done = time.monotonic(), 0
    with tqdm(desc="latency: rounds", disable=not progress) as bar:
        while True:
            for key in order:
                elapsed = _timed(watch, models[key])
                if done:
                    samples[key].append(elapsed)
                bar.update()
            shuffle.shuffle(order)
            fitting = 60 * watch.setting.minutes / (time.monotonic() - began) * (1 + done)
            last = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(fitting) - 1))
            bar.total = (1 + last) * len(order)
            if done >= last or (done >= GOOD_ROUNDS and _noise(samples.values()) <= GOOD_NOISE):
                return samples
            done += 1


def _timed(watch: Stopwatch, model: nn.Module) -> float:
    setting = watch.setting
    try:
        return watch.time(model)
    except torch.OutOfMemoryError as error:
        size = f"batch {setting.batch} x {setting.length} tokens"
        raise ConfigError(f"{size} does not fit into GPU memory: give a smaller one") from error


def _table(
    dense: DenseModel, conditions: Conditions, samples: Mapping[Any, Sequence[float]], depth: int
) -> LatencyTable:
    """Medians as a table: a part's times are what its models take more than what stays, by sublayer."""
    medians = {key: float(np.median(own)) for key, own in samples.items()}
    structure = dense.structure
    stays = {
        p.hidden: time for p, time in medians.items() if p is not None and p.part is None and p.empty == "identity"
    }
    idle = [(medians[Point(None, 0, width, empty="bias")] - stays[width]) / len(structure.sublayers) for width in stays]
    parts = {}
    for name, sublayers in parts_of(structure).items():
        own = {
            point: (time - stays[point.hidden]) / min(depth, len(sublayers))
            for point, time in medians.items()
            if point is not None and point.part == name
        }
        parts[name] = _part(structure, own, sublayers[0].kind)
    return LatencyTable(
        conditions=conditions,
        model=ModelIdentity.of(structure),
        rounds=len(samples[None]),
        noise=_noise(samples.values()),
        whole=medians[None],
        hidden=tuple(stays),
        stays=tuple(stays.values()),
        idle=tuple(idle),
        parts=parts,
    )


def _part(structure: Structure, times: Mapping[Point, float], kind: Literal["attn", "ffn"]) -> PartTimes:
    """Times of one part: whole units by hidden width, then heads that lost dimensions."""
    whole = [point for point in times if not point.is_ragged]
    units, widths = (sorted({getattr(point, name) for point in whole}) for name in ("units", "hidden"))
    by_size = {(point.units, point.hidden): times[point] for point in whole}
    return PartTimes(
        kind=kind,
        units=tuple(units),
        ms=tuple(tuple(by_size[number, width] for width in widths) for number in units),
        widths=tuple(_width_time(structure, point, ms) for point, ms in times.items() if point.is_ragged),
    )


def _width_time(structure: Structure, point: Point, ms: float) -> WidthTime:
    dims = structure.sizes.head_dim
    queries, values = (dims if kept is None else kept for kept in (point.queries, point.values))
    first = [kept if point.widest is None else point.widest for kept in (queries, values)]
    return WidthTime(
        heads=point.units,
        queries=first[0] + queries * (point.units - 1),
        values=first[1] + values * (point.units - 1),
        widest=max(queries, values, *first),
        ms=ms,
    )


def _noise(samples: Iterable[Sequence[float]]) -> float:
    """Standard error of a median, as a share of it: that of the middle one of all points, from absolute deviations."""
    shares = []
    for own in samples:
        values = np.asarray(own)
        deviation = 1.4826 * np.median(np.abs(values - np.median(values)))
        shares.append(1.2533 * deviation / np.sqrt(len(values)) / np.median(values))
    return float(np.median(shares))
