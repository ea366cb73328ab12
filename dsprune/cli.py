"""The command line: train, plan, consolidate, bench, compare, status, inspect, families; and what a rank runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsprune.errors import ConfigError, DspruneError
from dsprune.run_folder import STAGES, TRAINING_STAGES

__all__ = ["main", "train_main"]

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
Any key of a recipe can be overridden; values are TOML, bare words are strings. Recipes: {recipes}
Exit codes: 0 done, 64 configuration, 65 data or architecture, 66 numerics, 69 a rank was lost,
73 cannot write, 74 checkpoint, 75 stopped on request (start again to go on), 70 bug.
To stop: SIGTERM, SIGINT, SIGUSR1, SIGUSR2, or a file named STOP in the run folder.
"""


def _train_help() -> str:
    width = max(map(len, STAGES))
    return TRAIN_HELP.format(stages="\n".join(f"  {name:<{width}}  {spec.help}" for name, spec in STAGES.items()))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def guarded(command: Callable[[], int | None]) -> int:
    """Run a command; a `DspruneError` becomes one line on rank 0 and its exit code on every rank."""
    try:
        return command() or 0
    except ConfigError as error:
        if _rank() == 0:
            for mistake in error.mistakes:
                print(f"error: {mistake}", file=sys.stderr)
        return error.exit_code
    except DspruneError as error:
        if _rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return DspruneError.exit_code


def _hush() -> None:
    """Keep other libraries' chatter off the screen; warnings that matter to a user are ours to give."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING if _rank() else logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "datasets", "filelock", "transformers", "deepspeed", "DeepSpeed", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch|deepspeed")


def _train_parser(prog: str) -> argparse.ArgumentParser:
    from dsprune.config import list_recipes

    parser = argparse.ArgumentParser(
        prog=prog,
        description=_train_help(),
        epilog=TRAIN_EPILOG.format(recipes=", ".join(list_recipes())),
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


def _exit_rank(code: int) -> None:
    """Leave at once after an error: destructors of half-built engines must not wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0:
        os._exit(code)


def train_main(arguments: Sequence[str]) -> int:
    """What one rank of `deepspeed dsprune/train.py` does."""
    parser = _train_parser("deepspeed dsprune/train.py")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(list(arguments))
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    _hush()

    def command() -> int:
        from dsprune.run.launch import execute, plan_text

        if options.dry_run:
            text = plan_text(options.recipe, options.overrides)
            if _rank() == 0:
                print(text)
        else:
            execute(options.recipe, options.overrides)
        return 0

    code = guarded(command)
    _exit_rank(code)
    return code


def _train(options: argparse.Namespace) -> int:
    from dsprune.run.launch import launch, plan_text

    if options.dry_run:
        if options.ranks:
            os.environ["WORLD_SIZE"] = str(options.ranks)
        print(plan_text(options.recipe, options.overrides))
        return 0
    return launch(options.recipe, options.overrides, ranks=options.ranks)


def _consolidate(options: argparse.Namespace) -> int:
    from dsprune.consolidate import consolidate

    report = consolidate(
        options.source,
        options.out,
        stage=options.stage,
        dtype=options.dtype,
        force=options.force,
        verify_hashes=not options.skip_hashes,
        head_multiple=options.head_multiple,
        progress=sys.stderr.isatty(),
    )
    print(report.render())
    return 0


def _bench(options: argparse.Namespace) -> int:
    from dsprune.measure.bench import bench_models

    if options.calibrate is not None:
        return _calibrate(options)
    if options.compact is None:
        raise ConfigError("bench needs two model folders to compare, or --calibrate FOLDER")
    if options.block or options.shape:
        raise ConfigError("--block and --shape say what --calibrate is to measure: give that too")
    report = bench_models(
        options.dense,
        options.compact,
        batch_sizes=options.batch,
        length=options.length,
        dtype=options.dtype,
        device=options.device,
        runs=options.runs,
        warmup=options.warmup,
        progress=sys.stderr.isatty(),
    )
    print(report.render())
    if options.json is not None:
        report.to_json(options.json)
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from dsprune.measure.calibrate import calibrate, matrices_of, store

    if options.dense is not None or options.json is not None:
        raise ConfigError("--calibrate takes one model folder and writes its figures there: no others, and no --json")
    found = calibrate(
        matrices_of(options.calibrate, blocks=options.block, shapes=options.shape),
        batch_sizes=options.batch,
        length=options.length,
        dtype=options.dtype,
        device=options.device,
        runs=options.runs,
        warmup=options.warmup,
        progress=sys.stderr.isatty(),
    )
    print("\n\n".join(calibration.render() for calibration in found))
    print(f"wrote {' and '.join(map(str, store(options.calibrate, found)))}")
    return 0


def _sides(text: str) -> tuple[int, int]:
    """Two sizes of a command line, such as 32x32."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


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
    if status["state"] == "running" and (
        ranks := describe_ranks(read_beats(folder), time.time(), patience=STALE_SECONDS)
    ):
        print(ranks)
    if options.stacks:
        answered = wait_for_stacks(folder)
        print("\n".join(f"stacks: {path}" for path in answered) or "stacks: no rank answers")
    return verdict(status, 0, options.since)


def _compare(options: argparse.Namespace) -> int:
    from dsprune.measure.comparison import compare_runs

    print(compare_runs([Path(run) for run in options.runs], plot=options.plot))
    return 0


def _families(options: argparse.Namespace) -> int:
    from dsprune.methods.families import families_table

    print(families_table())
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from dsprune.measure.inspection import describe_compact, describe_spaces, inspect_config, inspect_dense

    source = Path(options.source)
    if source.is_dir():
        config = inspect_config(source)
        if "dsprune" in config:
            print(describe_compact(config))
            return 0
    print(describe_spaces(inspect_dense(options.source)))
    return 0


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
    )
    print(text)
    return 0


Commands = Any
"""What `add_subparsers` gives; argparse keeps its type to itself."""


def _add_train(commands: Commands) -> None:
    train = commands.add_parser("train", help="run a recipe", parents=[_train_parser("dsprune train")], add_help=False)
    train.description, train.formatter_class = _train_help(), argparse.RawDescriptionHelpFormatter
    train.add_argument("--ranks", type=int, help="processes to start (default: the number of GPUs, or 1)")
    train.set_defaults(run=_train)


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory per rank that pruning a model takes",
        description="Student, teacher, activations and distillation, from a configuration alone: no weights are read, "
        "and a model of any size can be planned on any machine. `dsprune train RECIPE --dry-run` plans a recipe.",
    )
    plan.add_argument("model", help="config.json, model folder or hub id")
    plan.add_argument("--teacher", help="likewise (default: the same model)")
    plan.add_argument("--ranks", type=int, default=1, help="number of ranks (1)")
    plan.add_argument("--student-ds", default="zero3_bf16", help="DeepSpeed configuration, name or path (zero3_bf16)")
    plan.add_argument("--teacher-ds", default="teacher_zero3_bf16", help="of the teacher (teacher_zero3_bf16)")
    plan.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch of one rank (1)")
    plan.add_argument("--length", type=int, default=512, help="tokens a sequence (512)")
    plan.add_argument("--chunk", type=int, default=512, help="tokens whose logits exist at a time (512)")
    plan.set_defaults(run=_plan)


def _add_consolidate(commands: Commands) -> None:
    consolidate = commands.add_parser(
        "consolidate",
        help="turn a checkpoint into a Hugging Face folder",
        description="Offline: reads ZeRO shards and final gates in one process, writes a compact model that loads in "
        "plain transformers, and compares its logits with the masked model's before it says done.",
    )
    consolidate.add_argument("source", help="a run folder, or one checkpoint of it (step-...)")
    consolidate.add_argument("out", help="folder to write; must not exist or be empty")
    consolidate.add_argument("--stage", choices=TRAINING_STAGES, default="prune", help="which stage of a run (prune)")
    consolidate.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    consolidate.add_argument(
        "--head-multiple",
        type=int,
        default=8,
        help="heads of unequal size are padded, when they run, to a multiple of this (default: 8); stored they are not",
    )
    consolidate.add_argument("--force", action="store_true", help="replace what is in OUT")
    consolidate.add_argument("--skip-hashes", action="store_true", help="check file sizes only, not their hashes")
    consolidate.set_defaults(run=_consolidate)


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="latency and throughput of two models side by side",
        description="Times two models alternately in one process: medians with spread, device, dtype, batch and "
        "length named.",
    )
    bench.add_argument("dense", nargs="?", help="model folder to compare with")
    bench.add_argument("compact", nargs="?", help="model folder to time")
    bench.add_argument(
        "--calibrate",
        metavar="FOLDER",
        help="instead: measure up to which density block-sparse weights are faster than dense ones on this device, for "
        "the matrices of a model, and store that in its folder, which decides by it what runs",
    )
    bench.add_argument("--block", type=_sides, nargs="+", default=[], metavar="RxC", help="block sizes (the model's)")
    bench.add_argument("--shape", type=_sides, nargs="+", default=[], metavar="RxC", help="matrices (the model's)")
    bench.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128], help="batch sizes (1 32 128)")
    bench.add_argument("--length", type=int, default=128, help="tokens a sequence (128)")
    bench.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    bench.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    bench.add_argument("--runs", type=int, default=20, help="timed runs of each model (20)")
    bench.add_argument("--warmup", type=int, default=3, help="untimed runs first (3)")
    bench.add_argument("--json", type=Path, help="also write the figures here")
    bench.set_defaults(run=_bench)


def _add_status(commands: Commands) -> None:
    status = commands.add_parser(
        "status",
        help="how a run stands or ended, as an exit code, too",
        description="Reads status.json of a run folder, and the heartbeats of its ranks: who is silent, and what the "
        "others wait in since when. Exit codes as of training; 69 where a run neither ended nor goes on.",
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
    status.set_defaults(run=_status)


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="finished runs in one table, with their Pareto front",
        description="Reads report.json of each run folder; those that have none are listed as unfinished.",
    )
    compare.add_argument("runs", nargs="+", help="run folders")
    compare.add_argument("--plot", type=Path, help="draw metric against size into this PNG")
    compare.set_defaults(run=_compare)


def _add_inspect(commands: Commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what can be pruned in a model, or what was kept",
        description="A dense model: its gates and what each removes. A compact model or a run: what was kept.",
    )
    inspect.add_argument("source", help="model folder, hub id, or run folder")
    inspect.set_defaults(run=_inspect)


def _add_families(commands: Commands) -> None:
    families = commands.add_parser(
        "families",
        help="which methods prune which model families, as a Markdown table",
        description="A gap has a reason, which also refuses the run before it starts.",
    )
    families.set_defaults(run=_families)


def _parser() -> argparse.ArgumentParser:
    import dsprune

    parser = argparse.ArgumentParser(prog="dsprune", description="Structured pruning of transformers under DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"dsprune {dsprune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_train,
        _add_plan,
        _add_consolidate,
        _add_bench,
        _add_status,
        _add_compare,
        _add_inspect,
        _add_families,
    ):
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The `dsprune` command."""
    options, extra = _parser().parse_known_args(arguments)
    # argparse loses overrides that stand behind an option (`train demo --ranks 2 seed=1`).
    if extra and options.command == "train" and not any(word.startswith("-") for word in extra):
        options.overrides += extra
    elif extra:
        _parser().error(f"unrecognized arguments: {' '.join(extra)}")
    _hush()
    return guarded(lambda: options.run(options))
