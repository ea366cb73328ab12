"""From a command line to an exit code: parsers of all commands, and what a rank of a launch does."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from dsprune.cli import latency_command, model_commands, run_commands
from dsprune.errors import ConfigError, DspruneError

__all__ = ["guarded", "main", "train_main"]


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


def _exit_rank(code: int) -> None:
    """Leave at once after an error: destructors of half-built engines must not wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0:
        os._exit(code)


def train_main(arguments: Sequence[str]) -> int:
    """What one rank of `deepspeed dsprune/train.py` does."""
    parser = run_commands.train_parser("deepspeed dsprune/train.py")
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


OVERVIEW = """\
Structured pruning of transformers under DeepSpeed: a model is pruned while it trains, and comes out smaller.

a run goes through these stages (`dsprune train --help`):
{stages}
"""
EPILOG = """\
from a model to a smaller one:
  dsprune train demo --ranks 2                              all stages on a generated task, in minutes
  dsprune status runs/demo                                  how it stands
  dsprune inspect runs/demo                                 what was kept
  dsprune evaluate runs/demo/recovered --task order         its metric, in one process
  dsprune bench runs/demo/teacher/model runs/demo/recovered   its speed beside the dense model's

`dsprune COMMAND --help` explains a command, with examples. `dsprune train --keys` lists every key of a recipe.
"""
ADD = (
    run_commands.add_train,
    run_commands.add_plan,
    run_commands.add_status,
    run_commands.add_compare,
    model_commands.add_evaluate,
    model_commands.add_bench,
    latency_command.add_latency,
    model_commands.add_inspect,
    model_commands.add_consolidate,
    model_commands.add_import,
    model_commands.add_families,
)
"""The commands, in the order of the overview."""


def _parser() -> argparse.ArgumentParser:
    import dsprune

    parser = argparse.ArgumentParser(
        prog="dsprune",
        usage="dsprune COMMAND ...",
        description=OVERVIEW.format(stages=run_commands.stage_lines()),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dsprune {dsprune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND, one of:", title="commands")
    for add in ADD:
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The `dsprune` command."""
    parser = _parser()
    options, extra = parser.parse_known_args(arguments)
    # argparse loses overrides that stand behind an option (`train demo --ranks 2 seed=1`).
    if extra and "overrides" in options and not any(word.startswith("-") for word in extra):
        options.overrides += extra
    elif extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    _hush()
    return guarded(lambda: options.run(options))
