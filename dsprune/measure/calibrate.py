"""At which density block-sparse weights begin to pay: measured on the present device, stored with the model.

A matrix runs block-sparse only where such a measurement says so; without one it runs dense.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsprune.consolidate.compact import without_weights
from dsprune.consolidate.modeling_dsprune import BlockLinear, has_kernel, place, shape_class, use_calibration
from dsprune.dtypes import torch_dtype
from dsprune.errors import CheckpointError, ConfigError, OutputError
from dsprune.measure.bench import check_options, limit_threads, wait
from dsprune.measure.calibrate_report import Calibration, CurvePoint
from dsprune.structure.blocks.grid import block_grid, to_blocks

__all__ = ["CURVES", "Calibration", "calibrate", "matrices_of", "store"]

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
BLOCKS = ((16, 16), (32, 32))
"""What is measured for a model that has no blocks yet."""
MARGIN = 0.1
"""A gain within the noise is not worth a second kernel."""
CURVES = "dsprune_calibration.json"
"""File in a model folder with all that was measured; the model itself reads only the densities in config.json."""

Size = tuple[int, int]


def calibrate(
    matrices: Sequence[tuple[Size, Size]],
    *,
    batch_sizes: Sequence[int],
    length: int,
    dtype: str = "float32",
    device: str | None = None,
    densities: Sequence[float] = DENSITIES,
    runs: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    progress: bool = False,
) -> list[Calibration]:
    """Time block-sparse against dense products of random matrices.

    Args:
        matrices: shape (out, in) and block size of each; of a class of shapes the first is measured.
        batch_sizes: sequences in the input.
        length: tokens a sequence.
        dtype: float32, bfloat16 or float16.
        device: `cpu` or `cuda[:N]`; by default a GPU if there is one.
        densities: shares of the blocks that are kept.
        runs: timed runs of each way, in turn.
        warmup: runs before those.
        threads: CPU threads of torch while this runs; by default as many as it has now.
        progress: show a bar on stderr.

    Returns:
        One calibration for each block size.

    Raises:
        ConfigError: wrong options, nothing to measure, or a block larger than its matrix.
    """
    spot = check_options(batch_sizes, length, dtype, device, runs, warmup, threads)
    if not matrices or not densities or not all(0 < density <= 1 for density in densities):
        raise ConfigError("calibration needs a matrix at least, and densities above 0 and up to 1")
    by_block: dict[Size, dict[str, Size]] = {}
    for shape, block in matrices:
        block_grid(shape, block)
        by_block.setdefault(block, {}).setdefault(shape_class(*shape), shape)
    tokens = [size * length for size in batch_sizes]
    cases = {
        block: [
            case for shape in shapes.values() for case in product([shape], tokens, _counts(shape, block, densities))
        ]
        for block, shapes in by_block.items()
    }
    where = (spot, torch_dtype(dtype))
    found = []
    bar = tqdm(total=sum(map(len, cases.values())), desc="calibrate", disable=not progress)
    with limit_threads(threads), torch.inference_mode(), bar:
        name, count, _ = place(*where)
        for block, own in cases.items():
            timed = _curve(own, block, where, runs, warmup, bar) if has_kernel(*where, block) else ()
            found.append(Calibration(name, count, dtype, block, torch.__version__, runs, MARGIN, tuple(timed)))
    return found


def _counts(shape: Size, block: Size, densities: Sequence[float]) -> list[int]:
    """Numbers of blocks that come nearest to some densities, ascending; a small matrix has fewer of them."""
    blocks = math.prod(block_grid(shape, block))
    return sorted({max(1, round(density * blocks)) for density in densities})


def _curve(
    cases: Sequence[tuple[Size, int, int]],
    block: Size,
    where: tuple[torch.device, torch.dtype],
    runs: int,
    warmup: int,
    bar: tqdm[Any],
) -> Iterator[CurvePoint]:
    for shape, tokens, kept in cases:
        modules = _both_ways(shape, block, kept, where)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(0)).to(*where)
        yield CurvePoint(shape, tokens, modules[0].density, *_median_ms(modules, x, runs, warmup))
        bar.update()


def _both_ways(
    shape: Size, block: Size, kept: int, where: tuple[torch.device, torch.dtype]
) -> tuple[BlockLinear, BlockLinear]:
    """A random matrix as a module that runs it dense and as one that runs it block-sparse."""
    generator = torch.Generator().manual_seed(0)
    grid = block_grid(shape, block)
    mask = (torch.randperm(math.prod(grid), generator=generator) < kept).view(grid)
    values, row_pointers, columns = to_blocks(torch.randn(shape, generator=generator), mask, block)
    state = {"values": values, "row_pointers": row_pointers, "columns": columns, "bias": torch.zeros(shape[0])}
    name, threads, dtype = place(*where)
    entry = {"device": name, "threads": threads, "dtype": dtype, "block": block}

    def module(threshold: float) -> BlockLinear:
        linear = BlockLinear(shape, block, kept).eval()
        linear.load_state_dict(state)
        use_calibration(linear, [entry | {"thresholds": {shape_class(*shape): threshold}}])
        return linear.to(*where)

    return module(0.0), module(2.0)


def _median_ms(modules: Sequence[nn.Module], x: Tensor, runs: int, warmup: int) -> list[float]:
    """Median milliseconds of each module on the same input, run in turn."""
    samples: list[list[float]] = [[] for _ in modules]
    for run in range(warmup + runs):
        for module, own in zip(modules, samples, strict=True):
            wait(x.device)
            start = time.perf_counter()
            module(x)
            wait(x.device)
            if run >= warmup:
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in samples]


def matrices_of(
    folder: str | Path, *, blocks: Sequence[Size] = (), shapes: Sequence[Size] = ()
) -> list[tuple[Size, Size]]:
    """The matrices that `calibrate` is to measure for a model.

    Args:
        folder: a model folder.
        blocks: block sizes; by default those that the model has, or 16 and 32 squared where it has none yet.
        shapes: out and in of matrices; by default those of the model's layers.

    Raises:
        ConfigError: not a model folder.
    """
    config = _read_json(Path(folder) / "config.json")
    try:
        model = without_weights(config)
    except (AttributeError, CheckpointError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder} is not a model folder: {error}") from error
    linears = [m for stack in model.modules() if isinstance(stack, nn.ModuleList) for m in stack.modules()]
    sparse = [module for module in linears if isinstance(module, BlockLinear)]
    if sparse and not blocks and not shapes:
        return list(dict.fromkeys((_size(module), module.block) for module in sparse))
    theirs = [_size(module) for module in linears if isinstance(module, BlockLinear | nn.Linear)]
    used = [module.block for module in sparse] or BLOCKS
    return list(dict.fromkeys(product(shapes or theirs, blocks or used)))


def _size(linear: BlockLinear | nn.Linear) -> Size:
    return linear.out_features, linear.in_features


def store(folder: str | Path, calibrations: Sequence[Calibration]) -> list[Path]:
    """Put calibrations into a model folder, in place of earlier ones of the same device, threads, dtype and block.

    Returns:
        What was written: the curves, and config.json if it has a `dsprune` table.

    Raises:
        ConfigError: a file that is there cannot be read.
        OutputError: the folder cannot be written.
    """
    curves, config = Path(folder) / CURVES, Path(folder) / "config.json"
    measured = _read_json(curves) if curves.exists() else {}
    measured["calibrations"] = _merged(measured.get("calibrations", []), [each.to_dict() for each in calibrations])
    written = [(curves, measured)]
    facts = _read_json(config)
    if "dsprune" in facts:
        table = facts["dsprune"]
        table["calibration"] = _merged(table.get("calibration", []), [each.entry() for each in calibrations])
        written.append((config, facts))
    for path, content in written:
        _write_json(path, content)
    return [path for path, _ in written]


def _merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def key(entry: dict[str, Any]) -> list[Any]:
        return [entry[name] for name in ("device", "threads", "dtype", "block")]

    replaced = [key(entry) for entry in new]
    return [*(entry for entry in old if key(entry) not in replaced), *new]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a table")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Aside and renamed: a model folder must not lose its configuration to a full disk."""
    scratch = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        scratch.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
