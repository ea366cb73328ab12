"""Commands about one model: evaluate, bench, inspect, consolidate, import, families."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsprune.cli.parsing import Commands, add_command
from dsprune.dtypes import DTYPES, names
from dsprune.errors import ConfigError
from dsprune.run_folder import TRAINING_STAGES

__all__ = ["add_bench", "add_consolidate", "add_evaluate", "add_families", "add_import", "add_inspect"]


def _without_bars() -> None:
    """Keep the bars of transformers off the screen, which say nothing that ours do not."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


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


def add_consolidate(commands: Commands) -> None:
    """`dsprune consolidate`."""
    consolidate = add_command(
        commands,
        "consolidate",
        _consolidate,
        summary="turn a checkpoint into a Hugging Face folder",
        description="Offline: reads ZeRO shards and final gates in one process, writes a compact model that loads in\n"
        "plain transformers, and compares its logits with the masked model's before it says done.",
        examples="  dsprune consolidate runs/demo out                             the last checkpoint of pruning\n"
        "  dsprune consolidate runs/demo out --stage recover --force     of recovery, over what is there\n"
        "  dsprune consolidate runs/demo/prune/checkpoints/step-00000500 out --dtype bfloat16",
    )
    consolidate.add_argument("source", help="a run folder, or one checkpoint of it (step-...)")
    consolidate.add_argument("out", help="folder to write; must not exist or be empty")
    consolidate.add_argument("--stage", choices=TRAINING_STAGES, default="prune", help="which stage of a run (prune)")
    consolidate.add_argument("--dtype", default="float32", choices=list(DTYPES))
    consolidate.add_argument(
        "--head-multiple",
        type=int,
        default=8,
        help="heads of unequal size are padded, when they run, to a multiple of this (default: 8); stored they are not",
    )
    consolidate.add_argument("--force", action="store_true", help="replace what is in OUT")
    consolidate.add_argument("--skip-hashes", action="store_true", help="check file sizes only, not their hashes")


def _evaluate(options: argparse.Namespace) -> int:
    from dsprune.config import TaskConfig, parse_tables
    from dsprune.run.reporting.scorecard import evaluate_folder
    from dsprune.tasks.sources.readers import EvalData

    _without_bars()
    task = {"name": options.task} | ({"max_length": options.max_length} if options.max_length is not None else {})
    tree = {"task": task, "data": {"path": options.data, "split": options.split}}
    tables = parse_tables({"task": TaskConfig, "data": EvalData}, tree, options.overrides)
    card = evaluate_folder(
        options.source,
        tables["task"],
        tables["data"],
        batch_size=options.batch,
        dtype=options.dtype,
        device=options.device,
        predictions=options.predictions,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    print(card.render())
    if options.json is not None:
        card.to_json(options.json)
    return 0


def add_evaluate(commands: Commands) -> None:
    """`dsprune evaluate`."""
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        summary="metric, sparsity and speed of any model folder on a task",
        description="Any finished model: dense, compact, block-sparse, stock, or a teacher. One process, no\n"
        "launcher and no DeepSpeed. The metrics are those that a run reports.",
        examples="  dsprune evaluate runs/x/recovered --task sst2 --data /data/glue\n"
        "  dsprune evaluate runs/x/compact --task mnli --data /data/glue --split matched --batch 128\n"
        "  dsprune evaluate runs/x/recovered --task sst2 --data /data/glue --split test --predictions submission\n"
        "                                       GLUE's own file, submission/SST-2.tsv; test needs no labels\n"
        "  dsprune evaluate FOLDER --task seq2seq --data D task.source_column=article task.prefix='\"summarize: \"'",
    )
    evaluate.add_argument("source", metavar="FOLDER", help="model folder, or hub id")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="keys task.* and data.* of a recipe")
    evaluate.add_argument("--task", required=True, help="as task.name of a recipe: sst2, mnli, squad, lm, ...")
    evaluate.add_argument("--data", help="folder with the files of the task (default: from the hub)")
    evaluate.add_argument("--split", help="one split, such as test (default: those that a run evaluates on)")
    evaluate.add_argument("--batch", type=int, default=64, help="examples of a forward pass (64)")
    evaluate.add_argument("--max-length", type=int, help="tokens of an example (128; SQuAD: 384)")
    evaluate.add_argument("--dtype", default="float32", help=names())
    evaluate.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    evaluate.add_argument("--seed", type=int, default=42, help="of generated data, as of the run (42)")
    evaluate.add_argument(
        "--predictions",
        type=Path,
        metavar="PATH",
        help="also write predictions for a leaderboard: a folder, for files such as SST-2.tsv, or one .tsv or .json",
    )
    evaluate.add_argument("--json", type=Path, help="also write the figures here")


def _bench(options: argparse.Namespace) -> int:
    from dsprune.measure.bench import bench_models

    _without_bars()
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


def add_bench(commands: Commands) -> None:
    """`dsprune bench`."""
    bench = add_command(
        commands,
        "bench",
        _bench,
        summary="latency and throughput of two models side by side",
        description="Times two models alternately in one process: medians with spread, device, dtype, batch and\n"
        "length named.",
        examples="  dsprune bench runs/demo/teacher/model runs/demo/recovered --batch 1 32 --json bench.json\n"
        "  dsprune bench --calibrate runs/x/sparse       up to which density block-sparse weights pay here",
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
    bench.add_argument("--dtype", default="float32", help=names())
    bench.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    bench.add_argument("--runs", type=int, default=20, help="timed runs of each model (20)")
    bench.add_argument("--warmup", type=int, default=3, help="untimed runs first (3)")
    bench.add_argument("--json", type=Path, help="also write the figures here")


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


def add_inspect(commands: Commands) -> None:
    """`dsprune inspect`."""
    inspect = add_command(
        commands,
        "inspect",
        _inspect,
        summary="what can be pruned in a model, or what was kept",
        description="A dense model: its gates and what each removes. A compact model or a run: what was kept.",
        examples="  dsprune inspect google-bert/bert-base-uncased     its gates, and what each would save\n"
        "  dsprune inspect runs/demo                         what was kept, layer by layer",
    )
    inspect.add_argument("source", help="model folder, hub id, or run folder")


def _import(options: argparse.Namespace) -> int:
    from dsprune.migrate import Origin, adopt

    _without_bars()
    report = adopt(
        options.method,
        Origin(
            options.source,
            config=options.config,
            tokenizer=options.tokenizer,
            labels=tuple(options.labels),
            first_step=options.first_step,
            block=options.block,
        ),
        options.out,
        dtype=options.dtype,
        force=options.force,
        head_multiple=options.head_multiple,
        progress=sys.stderr.isatty(),
    )
    print(report.render())
    return 0


def add_import(commands: Commands) -> None:
    """`dsprune import`."""
    adopt = add_command(
        commands,
        "import",
        _import,
        summary="a model that a method's authors' own code pruned, as a compact folder",
        description="Reads what the code of CoFi's, GRAIN's or MLPruning's authors left, folds soft masks into the\n"
        "weights, cuts away what they remove, and compares masked and compact logits. Nothing pickled is run.\n\n"
        "  cofi       a folder with dense weights and zs.pt, or with weights that are cut (the released models)\n"
        "  grain      gs<step>.pt, and the teacher's config.json\n"
        "  mlpruning  a folder of the first step (heads and rows); or one of the second (blocks), beside the first",
        examples="  dsprune import cofi CoFi-MNLI-s95 out --labels contradiction entailment neutral\n"
        "  dsprune import cofi out-cofi/best out --tokenizer bert-base-uncased\n"
        "  dsprune import grain pruned_models/gs42080.pt out --config teacher_models/config.json --tokenizer FOLDER\n"
        "  dsprune import mlpruning checkpoint-209000 out\n"
        "  dsprune import mlpruning blocks/checkpoint-198000 out --first-step checkpoint-209000 --block 32x32\n"
        "  dsprune evaluate out --task mnli --data /data/glue     then",
    )
    adopt.add_argument("method", choices=["cofi", "grain", "mlpruning"], help="whose code it was")
    adopt.add_argument("source", metavar="FOLDER", help="folder of the model, or its file of weights")
    adopt.add_argument("out", metavar="OUT", help="folder to write; must not exist or be empty")
    adopt.add_argument("--config", help="config.json of the dense model (default: FOLDER/config.json)")
    adopt.add_argument("--tokenizer", help="folder or hub id (default: FOLDER, if there is one in it)")
    adopt.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="NAME",
        help="classes in the order of the outputs, where the configuration does not name them",
    )
    adopt.add_argument("--first-step", metavar="FOLDER", help="of MLPruning's second step: what it began with")
    adopt.add_argument("--block", type=_sides, metavar="RxC", help="of MLPruning's second step: size of its blocks")
    adopt.add_argument("--dtype", default="float32", choices=list(DTYPES))
    adopt.add_argument(
        "--head-multiple", type=int, default=8, help="heads of unequal size are padded, when they run, to this (8)"
    )
    adopt.add_argument("--force", action="store_true", help="replace what is in OUT")
    adopt.set_defaults(run=_import)


def _families(options: argparse.Namespace) -> int:
    from dsprune.methods.support import families_table

    print(families_table())
    return 0


def add_families(commands: Commands) -> None:
    """`dsprune families`."""
    add_command(
        commands,
        "families",
        _families,
        summary="which methods prune which model families, as a Markdown table",
        description="A gap has a reason, which also refuses the run before it starts.",
        examples="  dsprune families",
    )
