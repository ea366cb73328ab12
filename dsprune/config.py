"""The configuration of a run: one typed tree, read from a TOML recipe and `key=value` overrides.

Unknown keys, wrong types and impossible values are all found before anything else happens, and all
told at once. Method options are checked against the class that the method itself declares, which
the caller hands in: configuration knows no method by name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from dsprune import dtypes
from dsprune.errors import ConfigError
from dsprune.files import did_you_mean
from dsprune.run_folder import STAGES, StageName

__all__ = [
    "BlocksConfig",
    "DataConfig",
    "DistillConfig",
    "Duration",
    "LatencyConfig",
    "OptimConfig",
    "RunConfig",
    "Section",
    "ShapeConfig",
    "StageName",
    "TaskConfig",
    "describe_keys",
    "list_recipes",
    "load_config",
    "parse_config",
    "parse_tables",
]


@dataclass(frozen=True)
class Duration:
    """A length of training: `"3 epochs"` or `"500 steps"` (optimizer steps)."""

    count: float
    unit: Literal["epochs", "steps"]

    def steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps, given how many make an epoch."""
        return round(self.count * (steps_per_epoch if self.unit == "epochs" else 1))

    def __str__(self) -> str:
        return f"{self.count:g} {self.unit}"


def _parse_duration(value: Any) -> Duration:
    if isinstance(value, Duration):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*", str(value))
    if match is None:
        raise ValueError('expected a duration such as "3 epochs" or "500 steps"')
    count = float(match[1])
    if match[2] == "step" and not count.is_integer():
        raise ValueError("steps are whole")
    return Duration(count, "epochs" if match[2] == "epoch" else "steps")


DurationField = Annotated[Duration, BeforeValidator(_parse_duration), PlainSerializer(str)]


class Section(BaseModel):
    """Base of every table of a recipe: frozen, no unknown keys, docstrings are the help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, arbitrary_types_allowed=True
    )


class ModelConfig(Section):
    """Where the pretrained model comes from."""

    name: str
    """Pretrained model to start from: a hub id, a folder, or `package:NAME/SUBFOLDER` inside an installed package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) to pin."""
    from_scratch: bool = False
    """Begin with random weights: of the model only its configuration is read."""


class StudentConfig(Section):
    """How the student is run while it trains."""

    activation_checkpointing: bool = False
    """Keep only what enters each layer for the backward pass, and compute the rest again: a third more time, far less
    memory."""


class TaskConfig(Section):
    """What the model is to do."""

    name: str
    """Task: `text_classification` or `token_classification` for data of your own, one of the nine of GLUE, `squad`,
    `squad_v2`, `conll2003`, `lm` (causal language modelling), `seq2seq`, `span_corruption` (the missing spans of a
    text, for encoder-decoders), or `order`, the generated one."""
    max_length: int = Field(128, ge=8)
    """Longest sequence in tokens; longer ones are cut. span_corruption: the length of its inputs."""
    metric: str | None = None
    """Metric that picks the best model; by default the first of the task's official ones. text_classification:
    `accuracy`, `macro_f1`, `mcc`, of two labels also `f1` (of the second); of a regression `pearson`, `spearman`; of
    several labels a text `micro_f1`, `macro_f1`. token_classification: `f1`, `precision`, `recall` of entities where
    the tags are IOB, else (or when asked for) `accuracy`, `macro_f1` of words."""
    labels: tuple[str, ...] | None = None
    """text_classification, token_classification: names of all labels in order, which numbers in the data then count
    from 0; by default those that the training examples hold, sorted, or as the data set names them."""
    problem: Literal["classification", "regression"] | None = None
    """text_classification: what the label column holds; by default numbers make a regression if any is not whole."""
    multi_label: bool = False
    """text_classification: a text has any number of labels, each on or off: a list, or text with separators."""
    label_separator: str = Field(",", min_length=1)
    """text_classification with multi_label: what stands between the labels of a text, where they are not a list."""
    stride: int = Field(128, ge=0)
    """SQuAD: tokens that two neighbouring windows on a long context share."""
    max_answer_length: int = Field(30, ge=1)
    """SQuAD: longest answer in tokens."""
    n_best: int = Field(20, ge=1)
    """SQuAD: how many of the most likely starts and of the most likely ends are combined."""
    null_threshold: float = 0.0
    """SQuAD v2: how much the score of no answer must exceed the best answer's to be given."""
    text_column: str = "text"
    """lm, span_corruption: column of the texts, a document a row; blank rows are passed over."""
    noise_density: float = Field(0.15, gt=0, lt=1)
    """span_corruption: share of the tokens that are dropped."""
    mean_span: float = Field(3.0, ge=1)
    """span_corruption: tokens of a dropped span, on average."""
    source_column: str = "source"
    """seq2seq: column of the texts that are read."""
    target_column: str = "target"
    """seq2seq: column of the texts that are to be written."""
    prefix: str = ""
    """seq2seq: put before every source, such as `"summarize: "` for T5."""
    max_target_length: int = Field(64, ge=2)
    """seq2seq: longest target in tokens; longer ones are cut in training, and never written in evaluation."""
    logits_chunk: int = Field(512, ge=1)
    """lm, seq2seq, span_corruption: tokens of a rank whose logits over the vocabulary exist at a time."""


class DataConfig(Section):
    """Where the examples come from."""

    path: str | None = None
    """Folder with train and validation files (parquet, csv, tsv, jsonl, json; whole or in shards, in it, in `data/` or
    in a subfolder named as the task); by default the data come from the hub."""
    columns: dict[str, str] = {}
    """What the data call the columns that the task reads, such as `{sentence = "text"}`. text_classification reads
    `text`, `text_pair` (where there is one) and `label`, token_classification `tokens` and `tags`."""
    validation_share: float | None = Field(None, gt=0, lt=1)
    """For want of a validation split: evaluate on this share of the training examples, which are not trained on."""
    revision: str | None = None
    """Hub revision of the data set to pin."""
    dataset: str | None = None
    """lm, span_corruption (by default WikiText-2), seq2seq, text_classification, token_classification: data set of the
    hub."""
    subset: str | None = None
    """Subset of that data set, where it has several."""
    evals: tuple[str, ...] = ("validation",)
    """lm, seq2seq, span_corruption, text_classification, token_classification: evaluation splits; figures of `test` are
    reported, and never picked by."""
    max_train_examples: int | None = Field(None, ge=1)
    """Use only the first so many training examples."""
    max_eval_examples: int | None = Field(None, ge=1)
    """Use only the first so many evaluation examples; figures then say so."""


class BatchConfig(Section):
    """How examples are grouped."""

    size: int = Field(32, ge=1)
    """Examples in one optimizer step, over all ranks and accumulation steps."""
    micro: int | None = Field(None, ge=1)
    """Examples in one forward pass of one rank; by default size / ranks, without accumulation."""
    eval: int = Field(64, ge=1)
    """Examples in one evaluation batch of one rank."""


class OptimConfig(Section):
    """How the weights are trained in one stage."""

    lr: float = Field(2e-5, gt=0)
    """Peak learning rate of the weights (AdamW)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, not on biases and norms."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the stage during which the learning rate rises linearly from zero."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after warm-up: linear decay to zero, or constant."""
    clip: float = Field(1.0, ge=0)
    """Global gradient norm above which the weights' gradients are scaled down; 0 turns clipping off."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of AdamW's two moments, per optimizer step."""
    epsilon: float = Field(1e-8, gt=0)
    """What AdamW adds to the root of its second moment (GRAIN: 1e-6)."""
    freeze_embeddings: bool = False
    """Leave the embeddings, and their norm and projection, as they were (CoFi and MLPruning do, while pruning and
    after); an output head that is the word embedding stays as it was with them."""


class TeacherConfig(OptimConfig):
    """The dense model that teaches, and its fine-tuning."""

    path: str | None = None
    """A dense model already fine-tuned for the task; then the teacher stage is skipped."""
    duration: DurationField = Duration(3, "epochs")
    """How long to fine-tune the dense model."""


class PruneConfig(OptimConfig):
    """The pruning stage: target and training."""

    target: float = Field(0.95, ge=0, lt=1)
    """Share to remove of what `target_of` names, counted on the exported model."""
    target_of: Literal["encoder", "total", "macs"] = "encoder"
    """What `target` is a share of: the encoder's parameters, all parameters of the model, or the multiply-adds of a
    sequence of `task.max_length` tokens."""
    speedup: float | None = Field(None, gt=1)
    """Instead of `target`: how many times as fast as the dense model the pruned one is to be, as measured where the run
    takes place; `[latency]` says on what."""
    duration: DurationField = Duration(20, "epochs")
    """Length of the whole stage, the pre-pruning phase included."""
    start: Literal["pretrained", "teacher"] = "pretrained"
    """Weights that the student starts from (the paper: pretrained)."""
    embedding_rank: int = Field(0, ge=0)
    """Factor the student's word embedding to this rank by a singular value decomposition, before pruning (GRAIN:
    192); 0 leaves it whole."""
    keep_best: bool = False
    """Export the checkpoint of the best evaluation among those at which the target was reached, instead of the last
    one (CoFi's code); gates and weights are those of that moment, landed on the target."""
    sparsity_epsilon: float = Field(0.01, ge=0, lt=1)
    """How far the expected sparsity may be from the target and still have reached it (CoFi's README: 0.01 for 95%)."""


class RecoverConfig(OptimConfig):
    """The compact model's further training."""

    duration: DurationField = Duration(20, "epochs")
    """How long the compact model trains on; `"0 steps"` skips the stage."""
    schedule: Literal["linear", "constant"] = "constant"
    """Learning rate after warm-up (the paper: constant)."""


class BlocksConfig(OptimConfig):
    """MLPruning's second step: blocks of the compact model's matrices, by learnable top-k."""

    duration: DurationField = Duration(0, "steps")
    """How long to prune blocks; `"0 steps"` skips the stage."""
    target: float = Field(0.6, ge=0, lt=1)
    """Share to remove of the encoder parameters that the compact model has."""
    shape: tuple[int, int] = (32, 32)
    """Rows and columns of a block."""
    lr: float = Field(3e-5, gt=0)
    """Peak learning rate of the weights (AdamW)."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the stage during which the learning rates rise linearly from zero."""
    scores_lr: float = Field(0.01, gt=0)
    """Peak learning rate of scores and thresholds (AdamW)."""
    init: float = 10.0
    """Initial threshold of a matrix, a logit: 10 keeps all blocks."""
    scores: Literal["magnitude", "zero", "uniform", "kaiming"] = "magnitude"
    """What the blocks' scores start from: the norm of their weights, or as in the authors' code: zero (what they used),
    uniform on (-scores_scale, scores_scale), or kaiming, which is uniform on (-1, 1) for scores of single blocks."""
    scores_scale: float = Field(1.0, gt=0)
    """With scores = "uniform": how far from zero they may start."""
    penalty: float = Field(20000.0, gt=0)
    """Weight of the regularisation at the start."""
    two_sided: bool = True
    """Pull sizes back up when they fall below the target; the authors do not."""


class ShapeConfig(Section):
    """Sizes that all layers are to end with, so that the export is a stock model without code of its own."""

    hidden: int | None = Field(None, ge=1)
    """Hidden size of the pruned model; by default that of the dense one."""
    ffn: int | None = Field(None, ge=1)
    """FFN neurons of every layer; by default those of the dense model."""
    heads: int | None = Field(None, ge=1)
    """Attention heads of every layer, those that share keys and values counted each; by default the dense model's."""
    layers: int | None = Field(None, ge=1)
    """Layers that are left, each with both its sublayers; by default all."""
    uniform: bool = False
    """Instead of given sizes: those that the method finds at `prune.target`, the same in every layer."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are given, by name."""
        named = {name: getattr(self, name) for name in ("hidden", "ffn", "heads", "layers")}
        return {name: size for name, size in named.items() if size is not None}

    @model_validator(mode="after")
    def _one_or_the_other(self) -> ShapeConfig:
        if self.uniform and self.sizes:
            raise ValueError(
                f"uniform = true finds the sizes that meet prune.target, and {', '.join(self.sizes)} "
                "gives them: leave out one or the other"
            )
        return self


class DistillConfig(Section):
    """What the student learns from the teacher."""

    logits: float = Field(0.1, ge=0)
    """Weight of the logit loss."""
    temperature: float = Field(2.0, gt=0)
    """Temperature of the logit loss."""
    logit_scale: Literal["temperature", "none"] = "temperature"
    """Multiply the logit loss by the squared temperature (CoFi), or not (GRAIN)."""
    top_k: int | None = Field(None, ge=1)
    """lm, seq2seq: keep the teacher's so many largest logits of a token, and all others as one bucket; by default the
    loss is over the whole vocabulary."""
    layers: float = Field(0.9, ge=0)
    """Weight of the layerwise hidden-state loss."""
    attentions: float = Field(0.0, ge=0)
    """Weight of the loss between attention maps (MLPruning); above 0 both models run eager attention."""
    labels: float = Field(0.0, ge=0)
    """Weight of the task's own loss on the labels (the paper: none beside a teacher)."""
    match: Literal["fixed", "free", "monotone"] = "free"
    """Which student layer learns from a teacher layer: the same one (of a teacher of another depth: the one at the same
    height), the nearest (CoFi's version 3), or the nearest in rising order (its version 4)."""
    projection: Literal["shared", "separate", "none"] = "shared"
    """From student to teacher width: one learned projection (CoFi), one for each teacher layer (GRAIN), or none
    (MLPruning; equal widths)."""
    projection_rate: Literal["weights", "constant"] = "weights"
    """How projections train: as the weights do, or at the peak learning rate throughout, without warm-up, decay or
    weight decay (GRAIN's code)."""
    teacher_layers: tuple[int, ...] | None = None
    """Teacher layers that teach, counted from 1, 0 being the embeddings; by default four of the teacher's, evenly
    spaced, ending with the last. Those of a decoder follow on those of its encoder."""
    layer_pairs: tuple[tuple[int, int], ...] | None = None
    """Instead, with match = "fixed": pairs of a student layer and the teacher layer that it learns from, such as
    `[[2, 4], [6, 12]]`, counted likewise; the embeddings pair with the embeddings, `[0, 0]`."""
    teacher_draw: Literal["all", "random", "quarters"] = "all"
    """Which of these layers teach at a step: all, four drawn anew (CoFi's version 5), or one drawn from each quarter
    (its version 6); a draw is from all of the teacher's layers, unless teacher_layers names others."""

    @model_validator(mode="after")
    def _layers_fit_together(self) -> DistillConfig:
        if self.layer_pairs is not None and self.teacher_layers is not None:
            raise ValueError("layer_pairs says which teacher layers teach: leave out teacher_layers")
        if self.layer_pairs is not None and (self.match != "fixed" or self.teacher_draw != "all"):
            raise ValueError('layer_pairs is a fixed match of layers that all teach: set match = "fixed", and no draw')
        if self.teacher_draw != "all" and 0 in (self.teacher_layers or ()):
            raise ValueError("teacher_draw draws layers, and teacher_layers names 0, the embeddings: leave it out")
        return self


class DeepSpeedConfig(Section):
    """DeepSpeed configurations of the two engines."""

    student: str = "zero2"
    """DeepSpeed configuration of the student: a name in ds_configs/ or a path."""
    teacher: str = "teacher"
    """DeepSpeed configuration of the teacher (stage 0 or 3): a name in ds_configs/ or a path."""


class EvalConfig(Section):
    """Evaluation while training, and the closing comparison."""

    every: DurationField = Duration(1, "epochs")
    """How often to evaluate while training."""
    bench_batch: int = Field(32, ge=1)
    """Batch size of the closing latency comparison."""
    bench_length: int | None = Field(None, ge=8)
    """Length in tokens of the closing latency comparison; by default `task.max_length`."""


class LatencyConfig(Section):
    """Milliseconds of the model's parts, on the device that is to serve it."""

    table: str | None = None
    """File that `dsprune latency` wrote; by default a table is measured where it is needed."""
    allow_foreign: bool = False
    """Take a table of another device, dtype, batch, length, runtime or depth of the model."""
    batch: int | None = Field(None, ge=1)
    """Sequences of a forward pass; by default `eval.bench_batch`."""
    length: int | None = Field(None, ge=8)
    """Tokens of a sequence; by default `eval.bench_length`."""
    dtype: dtypes.Name = "float32"
    """What the weights are when the model serves."""
    device: str | None = None
    """`cpu` or `cuda[:N]`; by default a GPU if there is one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch; by default as many as a process has."""
    runtime: Literal["torch", "compile"] = "torch"
    """What runs the model when it serves."""
    minutes: float = Field(3.0, gt=0)
    """How long measuring may take."""


class CheckpointConfig(Section):
    """How often to save, and how much to keep."""

    every: DurationField = Duration(1, "epochs")
    """How often to save while pruning and recovering."""
    keep: int = Field(2, ge=2)
    """How many checkpoints of a stage to keep: the newest, and at least one more to fall back to."""
    resume: Literal["auto", "must", "never"] = "auto"
    """What to do with checkpoints of a stage: go on from the newest that is whole (auto), likewise and refuse to begin
    at step 0 (must), or refuse a folder that holds any (never)."""
    reshard: bool = True
    """Go on from a checkpoint of another number of ranks or ZeRO stage, converting it while it is read."""
    allow_drift: tuple[str, ...] = ()
    """Keys of the recipe that may differ from those that the checkpoint was trained with, such as `prune.lr`."""


class ClusterConfig(Section):
    """Living on a shared machine: limits and time-outs."""

    time_limit_minutes: float | None = Field(None, gt=0)
    """Stop in time, with a checkpoint, this long after the launch; under SLURM, before the end of the job as well."""
    margin_minutes: float = Field(5.0, ge=0)
    """How long before the end of a SLURM job to stop: more than a step, an evaluation batch and a save together."""
    timeout_minutes: float = Field(30.0, gt=0)
    """How long a rank waits for the others before it takes them for lost."""


class LogConfig(Section):
    """What is written while training."""

    every: int = Field(10, ge=1)
    """Optimizer steps between two lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard scalars to `OUTPUT/tensorboard`."""
    wandb: bool = False
    """Also log to Weights & Biases (`pip install wandb`)."""
    wandb_project: str = "dsprune"
    """Project name for Weights & Biases."""


class MethodConfig(Section):
    """The pruning method; its own options stand in the same table."""

    name: str = "cofi"
    """Pruning method."""
    options: Any = None
    """Options of the method; its other keys stand beside `name`."""


class RunConfig(Section):
    """One run: a model, a task, and the stages from dense to compact."""

    output: str
    """Folder of the run: checkpoints, logs, and the finished models."""
    seed: int = Field(42, ge=0)
    """Seed of data order, dropout, initialisation and pruning noise."""
    stages: tuple[StageName, ...] = tuple(STAGES)
    """Stages of this launch, in order; a finished one is not redone."""
    model: ModelConfig
    student: StudentConfig = StudentConfig()
    task: TaskConfig
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    teacher: TeacherConfig = TeacherConfig()
    method: MethodConfig = MethodConfig()
    prune: PruneConfig = PruneConfig()
    shape: ShapeConfig = ShapeConfig()
    distill: DistillConfig = DistillConfig()
    recover: RecoverConfig = RecoverConfig()
    blocks: BlocksConfig = BlocksConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    eval: EvalConfig = EvalConfig()
    latency: LatencyConfig = LatencyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _stages_in_order(self) -> RunConfig:
        positions = [tuple(STAGES).index(stage) for stage in self.stages]
        if not positions or positions != sorted(set(positions)):
            raise ValueError(f"stages: name each stage once and in this order: {', '.join(STAGES)}")
        return self

    @model_validator(mode="after")
    def _one_target(self) -> RunConfig:
        prune = self.prune
        if prune.speedup is None:
            return self
        given = [f"prune.{name}" for name in ("target", "target_of") if name in prune.model_fields_set]
        given += ["[shape]"] if self.shape.uniform or self.shape.sizes else []
        given += ["prune.embedding_rank"] if prune.embedding_rank else []
        if given:
            raise ValueError(f"prune.speedup = {prune.speedup:g} does not go with {', '.join(given)}: leave out either")
        if self.latency.runtime != "torch":
            raise ValueError(
                f"prune.speedup = {prune.speedup:g} is measured as the report measures, in plain torch: leave out "
                f'latency.runtime = "{self.latency.runtime}"'
            )
        return self


def list_recipes() -> list[str]:
    """Names of the recipes that ship with dsprune."""
    folder = resources.files("dsprune") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix != ".toml" and not path.exists():
        if recipe not in list_recipes():
            there = list_recipes()
            hint = did_you_mean(recipe, there, otherwise=f"there are {', '.join(there)}", at_most=3)
            raise ConfigError(f"no recipe '{recipe}': {hint}")
        path = Path(str(resources.files("dsprune") / "recipes" / f"{recipe}.toml"))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from error


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Set one `a.b=value`; returns the mistake, if it is one. Values are TOML, bare words are strings."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        return f"override '{override}' is not of the form key=value"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            return f"override '{override}': {parent} is a value, not a table"
    tree[leaf] = value
    return None


def _give_way(prune: Any, overridden: Collection[str]) -> None:
    """Where an override sets a target of one kind, that of the other kind which the recipe has no longer counts."""
    if not isinstance(prune, dict):
        return
    for wins, loses in ((("speedup",), ("target", "target_of")), (("target", "target_of"), ("speedup",))):
        if any(f"prune.{name}" in overridden for name in wins):
            for name in loses:
                prune.pop(name, None)


def _mistakes(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        name = ".".join([*([prefix] if prefix else []), *path])
        if item["type"] == "extra_forbidden":
            yield f"unknown key '{name}'{_suggestion(schema, path)}"
        elif item["type"] == "missing":
            yield f"'{name}' is missing: give it in the recipe or as {name}=VALUE"
        else:
            message = item["msg"].removeprefix("Value error, ")
            yield f"'{name}' = {item['input']!r}: {message}" if path else message


def _suggestion(schema: type[BaseModel], path: Sequence[str]) -> str:
    for part in path[:-1]:
        field = schema.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return ""
        schema = field.annotation
    known = schema.model_fields
    hint = did_you_mean(path[-1], known, otherwise=f"known here are {', '.join(known)}")
    return f": {hint}"


def parse_config(tree: Mapping[str, Any], method_options: Callable[[str], type[Section]]) -> RunConfig:
    """Check a recipe's tree and build the configuration.

    Args:
        tree: what the TOML recipe holds, overrides applied.
        method_options: class of a method's options by the method's name; raises `ConfigError` for an
            unknown method.

    Raises:
        ConfigError: with every mistake that was found.
    """
    tree = dict(tree)
    mistakes: list[str] = []
    method = dict(tree.get("method") or {})
    name = method.pop("name", MethodConfig.model_fields["name"].default)
    try:
        schema = method_options(str(name))
        tree["method"] = {"name": name, "options": schema(**method)}
    except ConfigError as error:
        mistakes += error.mistakes
        tree["method"] = {"name": str(name)}
    except ValidationError as error:
        mistakes += _mistakes(error, schema, "method")
        tree["method"] = {"name": name}
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        mistakes += _mistakes(error, RunConfig)
    if mistakes:
        raise ConfigError(*mistakes)
    return config


def load_config(
    recipe: str, overrides: Sequence[str] = (), *, method_options: Callable[[str], type[Section]]
) -> RunConfig:
    """Read a recipe (a shipped name or a path), apply `key=value` overrides, check everything.

    Raises:
        ConfigError: unknown recipe, unreadable file, or any mistake in it, all told at once.
    """
    tree = _read_recipe(recipe)
    _give_way(tree.get("prune"), {override.partition("=")[0] for override in overrides})
    mistakes = [mistake for override in overrides if (mistake := _apply_override(tree, override))]
    if mistakes:
        raise ConfigError(*mistakes)
    tree.setdefault("output", f"runs/{Path(recipe).stem}")
    return parse_config(tree, method_options)


def parse_tables(
    schemas: Mapping[str, type[Section]], tree: dict[str, Any], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Check some tables of a recipe, without the others.

    Args:
        schemas: of each table, by its name.
        tree: the tables.
        overrides: `key=value`.

    Raises:
        ConfigError: with every mistake that was found.
    """
    mistakes = [mistake for override in overrides if (mistake := _apply_override(tree, override))]
    mistakes += [
        f"unknown key '{name}': here there are those of {', '.join(schemas)}" for name in tree if name not in schemas
    ]
    tables = {}
    for name, schema in schemas.items():
        try:
            tables[name] = schema.model_validate(tree.get(name, {}))
        except ValidationError as error:
            mistakes += _mistakes(error, schema, name)
    if mistakes:
        raise ConfigError(*mistakes)
    return tables


def describe_keys(schema: type[BaseModel], prefix: str = "") -> str:
    """Every key of a table, with its default and help text, one a line."""
    lines = []
    for name, field in schema.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines.append(describe_keys(inner, key))
        elif key != "method.options":
            default = "(required)" if field.is_required() else f"= {_plain(field.default)}"
            lines.append(f"  {key} {default}\n      {field.description or ''}".rstrip())
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return f'"{value}"' if isinstance(value, (str, Duration)) else str(value)
