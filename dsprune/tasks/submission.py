"""Predictions in the files that leaderboards take, and examples without labels, which only they can score.

GLUE (Wang et al. 2019, gluebenchmark.com/faq): one file a task, named as the task, with the columns `index` and
`prediction`; classes of MNLI, QNLI, RTE and the diagnostic set by name, of the others by number. SQuAD (Rajpurkar et
al. 2016): a JSON object from the id of a question to its answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dsprune.errors import ConfigError, OutputError
from dsprune.tasks.base import Task
from dsprune.tasks.batching import Encoded
from dsprune.tasks.benchmarks.glue import GLUE
from dsprune.tasks.kinds.sequence import SequenceTask
from dsprune.tasks.kinds.spans import SpanTask, Windows
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["blank_labels", "check_submission", "write_submission"]

GLUE_FILES = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}
MNLI_FILES = {"mismatched": "MNLI-mm", "matched": "MNLI-m", "ax": "AX"}
"""By what the name of the split ends with; the diagnostic set is answered by models of MNLI."""
NAMED = ("mnli", "qnli", "rte")
"""Tasks of GLUE whose classes go by their names."""


def blank_labels(task: Task) -> tuple[Task, set[str]]:
    """The task, reading examples without labels as well, and the splits that were found to have none.

    The hub marks such labels -1. They are read as 0: nothing may be measured on them.

    Args:
        task: any; only those with a label for each example are changed.

    Returns:
        the task; and a set that is filled, when the task has loaded, with the names in figures of such splits.
    """
    without: set[str] = set()
    if not isinstance(task, SequenceTask):
        return task, without

    def read(progress: bool) -> Splits:
        splits = task.read(progress)
        without.update(name for name, split in splits.evals.items() if _is_blank(split))
        return splits.map(lambda split: _filled(split) if _is_blank(split) else split)

    return replace(task, read=read), without


def _is_blank(split: Split) -> bool:
    return all(label in (-1, None, "-1", "") for label in split.columns.get("label", ()))


def _filled(split: Split) -> Split:
    note = f"{split.name}: it has no labels, so nothing is measured on it"
    return replace(split, columns={**split.columns, "label": [0] * len(split)}, notes=(*split.notes, note))


def check_submission(task: Task, path: Path) -> None:
    """See that there is a format for a task's predictions.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(task, (SequenceTask, SpanTask)):
        raise ConfigError(
            f"--predictions {path}: task '{task.name}' has no file format for them; tasks with a label for each "
            "example have one, and SQuAD has"
        )


def write_submission(task: Task, found: Mapping[str, tuple[Tensor, Encoded]], path: Path) -> list[Path]:
    """Write predictions, a file a split.

    Args:
        task: whose format is written.
        found: outputs of the model and the examples, by the split's name in figures.
        path: a folder, in which files have their official names; or, for one split, a .tsv or .json file.

    Raises:
        ConfigError: no format for the task, or one file for several splits.
        OutputError: it cannot be written.
    """
    check_submission(task, path)
    single = path.suffix in (".tsv", ".json") and not path.is_dir()
    if single and len(found) > 1:
        raise ConfigError(f"--predictions {path}: there are {len(found)} splits ({', '.join(found)}): name a folder")
    written = []
    for split, (outputs, data) in found.items():
        target = path if single else path / _file_name(task, split)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_text(task, outputs, data), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the predictions to {target}: {error.strerror}") from error
        written.append(target)
    return written


def _file_name(task: Task, split: str) -> str:
    if isinstance(task, SpanTask):
        return f"{task.name}.json"
    if task.name != "mnli":
        return f"{GLUE_FILES.get(task.name, task.name)}.tsv"
    ending = next((ending for ending in MNLI_FILES if split.endswith(ending)), None)
    return f"{MNLI_FILES[ending] if ending else split}.tsv"


def _text(task: Task, outputs: Tensor, data: Encoded) -> str:
    if isinstance(task, SpanTask):
        assert isinstance(data, Windows)
        return json.dumps(task.answers(outputs, data), ensure_ascii=False) + "\n"
    assert isinstance(task, SequenceTask)
    rows = (f"{index}\t{value}\n" for index, value in enumerate(_values(task, outputs)))
    return "".join(["index\tprediction\n", *rows])


def _values(task: SequenceTask, outputs: Tensor) -> Iterable[str]:
    """Predictions as text: target values within their bounds, or classes."""
    if not task.labels:
        return (f"{value:.3f}" for value in outputs.squeeze(-1).double().clamp(*task.bounds).tolist())
    classes = outputs.argmax(-1).tolist()
    by_number = task.name in GLUE and task.name not in NAMED
    return (str(index) if by_number else task.labels[index] for index in classes)
