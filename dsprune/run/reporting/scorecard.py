"""`dsprune evaluate`: a finished model folder on a task, in one process: metric, sparsity, seconds an example."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from dsprune.config import TaskConfig
from dsprune.dtypes import torch_dtype
from dsprune.engine.learning.evaluate import predict
from dsprune.engine.learning.objective import Objective, objective_for
from dsprune.engine.models.labelling import as_model_tells
from dsprune.engine.models.load import load_model, load_tokenizer
from dsprune.engine.models.skeleton import compact_facts
from dsprune.engine.ranks.alone import Alone
from dsprune.errors import ArchitectureError, ConfigError, OutputError
from dsprune.measure.bench import check_options, describe_device, num_positions, wait
from dsprune.measure.tables import render_table
from dsprune.pretrained import read_model_config, resolve_source
from dsprune.run_folder import STAGES, RunFolder
from dsprune.structure import CostModel, analyze
from dsprune.tasks import Encoded, Task, build_task
from dsprune.tasks.sources.readers import EvalData
from dsprune.tasks.submission import blank_labels, check_submission, write_submission

__all__ = ["Scorecard", "SplitScore", "evaluate_folder"]

logger = logging.getLogger(__name__)
ALIASES = {"LMHeadModel": "ForCausalLM"}
"""What GPT-2 calls its head."""
LENGTHS = {"squad": 384, "squad_v2": 384}
"""Tokens of an example, as the recipes have them; of all other tasks, the default of `task.max_length`."""
UNITS = {"spans": "window", "text": "sequence"}
"""What a model of a problem sees at once; of all others, an example."""


@dataclass(frozen=True)
class SplitScore:
    """One split.

    Attributes:
        metrics: by name; none where the examples have no labels.
        examples: that the model saw: examples, or windows or sequences of text.
        seconds_per_example: forward passes alone, whole batches, the device waited for.
    """

    metrics: Mapping[str, float]
    examples: int
    seconds_per_example: float


@dataclass(frozen=True)
class Scorecard:
    """What was found of a model.

    Attributes:
        source: folder or hub id.
        model: its class.
        task: that it was evaluated on.
        splits: by their names in figures.
        parameters: of the encoder, and all; as far as they are counted in the folder, of the dense model as well.
        sparsity: share of the dense model that is gone, encoder and total; empty for a dense model.
        device: that it ran on.
        dtype: of its weights.
        batch: examples of a forward pass.
        unit: what an example is called.
        notes: what has to be said beside the figures.
        written: files of predictions.
    """

    source: str
    model: str
    task: str
    splits: Mapping[str, SplitScore]
    parameters: Mapping[str, int]
    sparsity: Mapping[str, float]
    device: str
    dtype: str
    batch: int
    unit: str
    notes: tuple[str, ...] = ()
    written: tuple[str, ...] = ()

    def to_json(self, path: Path) -> None:
        """Write everything to a file.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the figures to {path}: {error.strerror}") from error

    def render(self) -> str:
        """A table of splits, and what they were measured on."""
        names = list(dict.fromkeys(name for score in self.splits.values() for name in score.metrics))
        rows = [
            [
                split,
                *(f"{score.metrics[name]:.4f}" if name in score.metrics else "-" for name in names),
                f"{score.examples:,}",
                f"{score.seconds_per_example:.2e}",
            ]
            for split, score in self.splits.items()
        ]
        headers = [self.task, *names, f"{self.unit}s", f"seconds a {self.unit}".replace("a example", "an example")]
        counted = ", ".join(f"{part} {count:,}" for part, count in self.parameters.items())
        lines = [
            render_table(headers, rows),
            f"{self.model}, {self.source}",
            f"parameters: {counted}",
            f"forward passes of {self.batch}, {self.dtype}, {self.device}",
        ]
        if self.sparsity:
            shares = ", ".join(f"{part} {share:.2%}" for part, share in self.sparsity.items())
            lines.insert(3, f"sparsity: {shares}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"predictions: {path}" for path in self.written)])


class _Timed:
    """Forward passes of a model, and how long they took.

    Attributes:
        examples: of the last split.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, device: torch.device) -> None:
        self.model = model
        self.objective = objective
        self.device = device
        self.examples = 0
        self._seconds = 0.0

    @property
    def mean_seconds(self) -> float:
        """Of an example of the last split."""
        return self._seconds / self.examples

    def all(self, name: str, data: Encoded, batch_size: int, progress: bool) -> Tensor:
        """What metrics of a split are made of: [examples, ...]."""
        self.examples, self._seconds = 0, 0.0
        with tqdm(total=-(-len(data) // batch_size), desc=f"evaluate {name}", disable=not progress) as bar:
            return predict(self, data, Alone(self.device), batch_size=batch_size, before_batch=lambda: _step(bar))

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        if not self.examples:
            # Once more beforehand, untimed: what is set up at first use takes longer than a batch.
            self.objective.predict(self.model, inputs, labels)
        wait(self.device)
        began = time.perf_counter()
        outputs = self.objective.predict(self.model, inputs, labels)
        wait(self.device)
        self._seconds += time.perf_counter() - began
        self.examples += len(outputs)
        return outputs


def _step(bar: tqdm[Any]) -> None:
    bar.update()


def evaluate_folder(
    source: str,
    settings: TaskConfig,
    data: EvalData,
    *,
    batch_size: int = 64,
    dtype: str = "float32",
    device: str | None = None,
    predictions: Path | None = None,
    seed: int = 42,
    progress: bool = False,
) -> Scorecard:
    """Evaluate any finished model on a task: dense, compact, block-sparse, stock, or a teacher.

    One process, without DeepSpeed.

    Args:
        source: model folder, or hub id.
        settings: of the task; of one on data of one's own, the model tells labels and kind where these do not.
        data: where its examples are, and which split.
        batch_size: examples of a forward pass.
        dtype: float32, bfloat16 or float16.
        device: `cpu` or `cuda[:N]`; by default a GPU if there is one.
        predictions: where to write predictions for a leaderboard; examples need no labels then.
        seed: of generated data, as `seed` of a run.
        progress: show progress bars.

    Raises:
        ConfigError: a wrong setting, or a source that is no model.
        DataError: data that the task cannot read.
        ArchitectureError: a model without a trained head for the task, or whose labels are not the task's.
        OutputError: predictions that cannot be written.
    """
    given = "max_length" in settings.model_fields_set
    if not given and settings.name in LENGTHS:
        settings = settings.model_copy(update={"max_length": LENGTHS[settings.name]})
    place = check_options([batch_size], settings.max_length, dtype, device, 1, 0, None)
    _check_run(source)
    config = read_model_config(source)
    task = build_task(as_model_tells(settings, config), data, seed=seed)
    without: set[str] = set()
    if predictions is not None:
        check_submission(task, predictions)
        task, without = blank_labels(task)
    _check_head(source, config, task)
    tokenizer = load_tokenizer(source)
    model = load_model(source, task, {}).to(dtype=torch_dtype(dtype)).to(place).eval()  # type: ignore[arg-type]
    task = _fit_length(source, model, task, given=given)
    evals, notes = task.load_evals(tokenizer, vocab_size=int(model.config.vocab_size), progress=progress)
    forward = _Timed(model, objective_for(task, model), place)
    splits, found = {}, {}
    for name, examples in evals.items():
        outputs = forward.all(name, examples, batch_size, progress)
        found[name] = outputs, examples
        metrics = {} if name in without else task.score(outputs, examples)
        splits[name] = SplitScore(metrics, forward.examples, forward.mean_seconds)
    written = [] if predictions is None else write_submission(task, found, predictions)
    return _card(source, model, task, splits, place, dtype, batch_size, notes, written)


def _card(
    source: str,
    model: PreTrainedModel,
    task: Task,
    splits: Mapping[str, SplitScore],
    place: torch.device,
    dtype: str,
    batch_size: int,
    notes: tuple[str, ...],
    written: Sequence[Path],
) -> Scorecard:
    parameters, sparsity = _sizes(source, model)
    return Scorecard(
        source=source,
        model=type(model).__name__,
        task=task.name,
        splits=splits,
        parameters=parameters,
        sparsity=sparsity,
        device=describe_device(place),
        dtype=dtype,
        batch=batch_size,
        unit=UNITS.get(task.problem, "example"),
        notes=notes,
        written=tuple(map(str, written)),
    )


def _check_run(source: str) -> None:
    folder = RunFolder(source)
    if folder.status.is_file():
        models = [str(folder.model_of(name)) for name, spec in STAGES.items() if spec.model and folder.has_model(name)]
        raise ConfigError(
            f"'{source}' is a run folder: give one of its models, {' or '.join(models) or 'of which there is none yet'}"
        )


def _check_head(source: str, config: PretrainedConfig, task: Task) -> None:
    """A head that was never trained answers at random: it must be in the folder."""
    name = (config.architectures or ["a model without a name"])[0]
    head = next((ours for theirs, ours in ALIASES.items() if name.endswith(theirs)), name)
    if not head.endswith(task.head):
        raise ArchitectureError(
            f"'{source}' is {name}, which has no trained head for task '{task.name}' ({task.head}): give a model that "
            "was fine-tuned for it"
        )
    if task.problem != "text" and config.num_labels != task.num_labels:
        raise ArchitectureError(
            f"'{source}' has {config.num_labels} labels and task '{task.name}' has {task.num_labels}: it was trained "
            "for another task"
        )


def _fit_length(source: str, model: PreTrainedModel, task: Task, *, given: bool) -> Task:
    """The task with examples no longer than the model's positions; a length that was asked for must be possible."""
    positions = num_positions(model)
    length = task.max_length
    if positions is None or length <= positions:
        return task
    if given:
        raise ConfigError(f"--max-length {length}: '{source}' has {positions} positions: give a smaller one")
    logger.warning("'%s' has %d positions: examples are cut at as many tokens, not at %d", source, positions, length)
    return replace(task, max_length=positions)


def _sizes(source: str, model: PreTrainedModel) -> tuple[dict[str, int], dict[str, float]]:
    """Parameters of encoder and all; and shares of the dense model that are gone, where the folder tells its size."""
    folder = resolve_source(source)
    facts = compact_facts(folder)
    if facts is None:
        cost = CostModel(analyze(model))
        return {"encoder": cost.dense("encoder"), "total": cost.dense("total")}, {}
    counted = facts["parameters"]
    sizes = {part: int(counted[part]) for part in ("encoder", "total")}
    return sizes, {part: 1 - size / counted[f"dense_{part}"] for part, size in sizes.items()}
