"""Packed ragged attention against one head after another, and against the dense model.

    python -m tests.benchmarks.packed_attention                 # BERT-base cut as the paper cuts it at 5% density
    python -m tests.benchmarks.packed_attention --model FOLDER  # a compact model of your own

GRAIN's authors run the heads of a pruned layer in a Python loop over weight slices (arXiv 2212.07634,
their notebook); here that loop, in the layers of the stock class, stands against the exported model as it runs, on the
same weights, with the outputs compared first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from dsprune.consolidate import apply_selection, load_compact
from dsprune.consolidate.modeling_dsprune import HeadLayout, Packing
from dsprune.measure.tables import render_table
from dsprune.structure import Selection, analyze, ones


class LoopedAttention(nn.Module):
    """The self-attention of one compact BERT layer, one head after another, as the authors run it."""

    def __init__(self, packed: Any, query_sizes: list[int], value_sizes: list[int]) -> None:
        super().__init__()
        self.scaling = packed.scaling
        self.sizes = (query_sizes, query_sizes, value_sizes)
        self.linears = nn.ModuleList([packed.query, packed.key, packed.value])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        weights = [linear.weight.split(sizes) for linear, sizes in zip(self.linears, self.sizes, strict=True)]
        biases = [linear.bias.split(sizes) for linear, sizes in zip(self.linears, self.sizes, strict=True)]
        heads = []
        for *weight, query_bias, key_bias, value_bias in zip(*weights, *biases, strict=True):
            query = F.linear(hidden_states, weight[0], query_bias)
            key = F.linear(hidden_states, weight[1], key_bias)
            value = F.linear(hidden_states, weight[2], value_bias)
            scores = query @ key.transpose(-1, -2) * self.scaling
            heads.append(scores.softmax(-1) @ value)
        return torch.cat(heads, -1), None


def looped(compact: nn.Module) -> nn.Module:
    """A copy of a compact BERT whose heads run one after another."""
    model: Any = copy.deepcopy(compact)
    facts = model.config.dsprune
    for layer, sizes in zip(model.bert.encoder.layer, facts["layers"], strict=True):
        if sizes["heads"] == 0:
            continue
        places = HeadLayout(sizes, facts).places
        query_sizes, value_sizes = (list(map(len, places[kind])) for kind in ("qk_dim", "vo_dim"))
        layer.attention.self = LoopedAttention(layer.attention.self, query_sizes, value_sizes)
        # What the loop gives has no places left out.
        layer.attention.output.packing = Packing()
    return model


def paper_like(heads: int, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """BERT-base with random weights, and its cut to the structure that the paper reports at 5% density:
    19 to 26 heads in 9 to 12 layers, 20 to 33 query and 26 to 38 value units a head, FFNs of 106 to 138.

    With more heads a layer (75 to 101 in all without structure regularisation) each is smaller, so that the
    parameters stay the same.
    """
    torch.manual_seed(seed)
    dense = BertForSequenceClassification(BertConfig()).eval()
    structure = analyze(dense)
    gates = ones(structure)
    for kind in ("qk_dim", "vo_dim", "ffn_dim"):
        gates[kind].fill_(0)
    for layer in range(12):
        for head in range(heads):
            begin = head * 64
            gates["qk_dim"][layer, begin : begin + int(torch.randint(20, 34, ())) * 2 // heads] = 1
            gates["vo_dim"][layer, begin : begin + int(torch.randint(26, 39, ())) * 2 // heads] = 1
        gates["ffn_dim"][layer, : int(torch.randint(106, 139, ()))] = 1
    return dense, apply_selection(dense, Selection.from_gates(structure, gates, empty="bias"))


def _timed(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def _ids(model: Any, batch: int, length: int) -> Tensor:
    """Random tokens that the model has, the special ones at the beginning of its vocabulary apart."""
    table: Tensor = model.get_input_embeddings().weight
    return torch.randint(len(table) // 2, len(table), (batch, length), device=table.device)


@torch.inference_mode()
def measure(models: dict[str, nn.Module], batch: int, length: int, runs: int, bar: Any) -> dict[str, float]:
    """Median milliseconds of each model, the models in turn."""
    ids = _ids(next(iter(models.values())), batch, length)
    times: dict[str, list[float]] = {name: [] for name in models}
    for run in range(runs + 2):
        for name, model in models.items():
            elapsed = _timed(lambda model=model: model(ids))
            if run >= 2:
                times[name].append(elapsed)
        bar.update()
    return {name: statistics.median(values) for name, values in times.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a compact BERT; by default BERT-base cut as in the paper")
    parser.add_argument("--dense", help="the dense model beside --model")
    parser.add_argument("--heads", type=int, default=2, help="heads left in each layer (default: 2)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--runs", type=int, default=9)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if options.model:
        compact = load_compact(options.model).eval()
        dense = BertForSequenceClassification.from_pretrained(options.dense).eval() if options.dense else None
    else:
        dense, compact = paper_like(options.heads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"packed": compact, "loop": looped(compact)} | ({"dense": dense} if dense is not None else {})
    models = {name: model.to(device) for name, model in models.items()}
    ids = _ids(compact, 2, options.length)
    with torch.inference_mode():
        difference = float((models["packed"](ids)[0] - models["loop"](ids)[0]).abs().max())
    rows = []
    with tqdm(total=len(options.batch) * (options.runs + 2)) as bar:
        for batch in options.batch:
            times = measure(models, batch, options.length, options.runs, bar)
            ratios = [f"{times[name] / times['packed']:.2f}x" for name in times if name != "packed"]
            rows.append([str(batch), *(f"{value:.2f}" for value in times.values()), *ratios])
    headers = ["batch", *(f"{name} ms" for name in models), *(f"over {name}" for name in models if name != "packed")]
    print(render_table(headers, rows))
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"length {options.length}, fp32, {where}, medians of {options.runs}; outputs differ by {difference:.1e}")


if __name__ == "__main__":
    main()
