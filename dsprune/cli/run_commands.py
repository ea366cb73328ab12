"""Commands about a whole run: train, plan, status, compare."""

from __future__ import annotations

import argparse
import os
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsprune.cli.parsing import Commands, add_command
from dsprune.errors import DspruneError
from dsprune.run_folder import STAGES

__all__ = ["add_compare", "add_plan", "add_status", "add_train", "train_parser"]

TRAIN_HELP = """\
Prune a transformer while it trains, with a dense teacher beside it.

stages (each is done once and remembered in the run folder):
{stages}

examples:
  deepspeed dsprune/train.py demo                            all stages of the demo, on the GPUs that are there
  dsprune train demo --ranks 2                               the same through DeepSpeed's launcher, with 2 ranks
  dsprune train cofi_sst2 prune.target=0.6 output=runs/s60   a shipped recipe with two keys changed
  dsprune train my.toml 'stages=["prune", "consolidate"]'    a recipe of your own, two stages only
  dsprune train cofi_mrpc data.path=/data/glue --dry-run     say what would be done, and do nothing
"""
TRAIN_EPILOG = """\
Any key of a recipe can be overridden; values are TOML, bare words are strings. Recipes:
{recipes}
Exit codes: 0 done, 64 configuration, 65 data or architecture, 66 numerics, 69 a rank was lost,
73 cannot write, 74 checkpoint, 75 stopped on request (start again to go on), 70 bug.
To stop: SIGTERM, SIGINT, SIGUSR1, SIGUSR2, or a file named STOP in the run folder.
"""


def stage_lines() -> str:
    """The stages of a run, one a line."""
    return "\n".join(f"  {name:<12} {spec.help}" for name, spec in STAGES.items())


def train_parser(prog: str) -> argparse.ArgumentParser:
    """The arguments that every way to train takes."""
    from dsprune.config import list_recipes

    parser = argparse.ArgumentParser(
        prog=prog,
        description=TRAIN_HELP.format(stages=stage_lines()),
        epilog=TRAIN_EPILOG.format(recipes=textwrap.fill(", ".join(list_recipes()), 100)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a shipped recipe's name, or a path to a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, spaces, batch and memory; exit")
    parser.add_argument("--keys", action=_ShowKeys, help="print every key of a recipe with its default; exit")
    return parser


class _ShowKeys(argparse.Action):
    """`--keys`: the configuration tree, from the same docstrings that developers read."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dsprune.config import RunConfig, describe_keys
        from dsprune.methods import METHODS

        print(describe_keys(RunConfig))
        for name, method in METHODS.items():
            print(f"\nwith method.name = {name}:\n{describe_keys(method.Options, 'method')}")
        parser.exit()


def _train(options: argparse.Namespace) -> int:
    from dsprune.run.launch import launch, plan_text

    if options.dry_run:
        if options.ranks:
            os.environ["WORLD_SIZE"] = str(options.ranks)
        print(plan_text(options.recipe, options.overrides))
        return 0
    return launch(options.recipe, options.overrides, ranks=options.ranks)


def add_train(commands: Commands) -> None:
    """`dsprune train`."""
    shared = train_parser("dsprune train")
    train = commands.add_parser("train", help="run a recipe: all stages, or some", parents=[shared], add_help=False)
    train.description, train.epilog, train.formatter_class = shared.description, shared.epilog, shared.formatter_class
    train.add_argument("--ranks", type=int, help="processes to start (default: the number of GPUs, or 1)")
    train.set_defaults(run=_train)


def _plan(options: argparse.Namespace) -> int:
    from dsprune.planning.forecast import plan_model

    text = plan_model(
        options.model,
        teacher=options.teacher,
        student_ds=options.student_ds,
        teacher_ds=options.teacher_ds,
        ranks=options.ranks,
        batch=options.batch,
        length=options.length,
        chunk=options.chunk,
        teacher_layers=options.teacher_layers,
    )
    print(text)
    return 0


def add_plan(commands: Commands) -> None:
    """`dsprune plan`."""
    plan = add_command(
        commands,
        "plan",
        _plan,
        summary="memory per rank that pruning a model takes",
        description="Student, teacher, activations and distillation, from a configuration alone: no weights are read,\n"
        "and a model of any size can be planned on any machine. `dsprune train RECIPE --dry-run` plans a recipe.",
        examples="  dsprune plan config.json --ranks 8 --student-ds zero3_bf16    one file is enough\n"
        "  dsprune plan FOLDER --teacher LARGER --batch 8 --length 128   a teacher of other sizes",
    )
    plan.add_argument("model", help="config.json, model folder or hub id")
    plan.add_argument("--teacher", help="likewise (default: the same model)")
    plan.add_argument(
        "--teacher-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="those that teach, counted from 1, 0 being the embeddings (default: four of the teacher's)",
    )
    plan.add_argument("--ranks", type=int, default=1, help="number of ranks (1)")
    plan.add_argument("--student-ds", default="zero3_bf16", help="DeepSpeed configuration, name or path (zero3_bf16)")
    plan.add_argument("--teacher-ds", default="teacher_zero3_bf16", help="of the teacher (teacher_zero3_bf16)")
    plan.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch of one rank (1)")
    plan.add_argument("--length", type=int, default=512, help="tokens a sequence (512)")
    plan.add_argument("--chunk", type=int, default=512, help="tokens whose logits exist at a time (512)")


def _status(options: argparse.Namespace) -> int:
    from dsprune.engine.ranks.pulse import STALE_SECONDS, describe_ranks, read_beats, wait_for_stacks
    from dsprune.run.status import read_status
    from dsprune.run.supervise import verdict
    from dsprune.run_folder import RunFolder

    folder = RunFolder(options.run_folder)
    status = read_status(folder)
    if status.get("written", 0.0) < options.since:
        print(f"{options.run_folder}: no launch has come to write a status{' since then' if options.since else ''}")
        return DspruneError.exit_code
    place = f"stage {status['stage']}, step {status['step']}" if status["stage"] else "before the first stage"
    reason = f": {status['reason']}" if "reason" in status else ""
    print(f"{options.run_folder}: {status['state']}, {place}{reason}")
    ranks = describe_ranks(read_beats(folder), time.time(), patience=STALE_SECONDS)
    if status["state"] == "running" and ranks:
        print(ranks)
    if options.stacks:
        print("\n".join(f"stacks: {path}" for path in wait_for_stacks(folder)) or "stacks: no rank answers")
    return verdict(status, 0, options.since)


def add_status(commands: Commands) -> None:
    """`dsprune status`."""
    status = add_command(
        commands,
        "status",
        _status,
        summary="how a run stands or ended, as an exit code, too",
        description="Reads status.json of a run folder, and the heartbeats of its ranks: who is silent, and what the\n"
        "others wait in since when. Exit codes as of training; 69 where a run neither ended nor goes on.",
        examples="  dsprune status runs/demo                             one line, and the exit code of the run\n"
        "  dsprune status runs/demo --since 1790000000         only of a launch after this time\n"
        "  dsprune status runs/demo --stacks                    where every rank is, line by line",
    )
    status.add_argument("run_folder", help="folder of a run")
    status.add_argument(
        "--since", type=float, default=0.0, help="only of a launch after this time (seconds since 1970)"
    )
    status.add_argument(
        "--stacks",
        action="store_true",
        help="make every rank write what its threads are doing, and name the files; a rank that is stopped cannot "
        "answer (kill -QUIT does the same to one rank)",
    )


def _compare(options: argparse.Namespace) -> int:
    from dsprune.measure.comparison import compare_runs

    print(compare_runs([Path(run) for run in options.runs], plot=options.plot))
    return 0


def add_compare(commands: Commands) -> None:
    """`dsprune compare`."""
    compare = add_command(
        commands,
        "compare",
        _compare,
        summary="finished runs in one table, with their Pareto front",
        description="Reads report.json of each run folder; those that have none are listed as unfinished.",
        examples="  dsprune compare runs/*                              a table, the best of each task marked\n"
        "  dsprune compare runs/a runs/b --plot pareto.png     and a picture of metric against size",
    )
    compare.add_argument("runs", nargs="+", help="run folders")
    compare.add_argument("--plot", type=Path, help="draw metric against size into this PNG")
