"""Whether a given teacher can teach this student at all: told from its configuration and tokenizer, no weight read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dsprune.arch import family_for
from dsprune.config import RunConfig
from dsprune.engine.models.load import load_tokenizer
from dsprune.engine.models.skeleton import check_quantization, compact_facts, skeleton
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.pretrained import read_model_config, resolve_source
from dsprune.structure.layout import family_of
from dsprune.tasks import Task
from dsprune.tasks.label_order import label_permutation

__all__ = ["check_positions", "check_start", "check_teacher"]


def check_teacher(config: RunConfig, task: Task, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a given teacher knows the task's labels, in some order, and reads the student's tokens.

    Args:
        config: the run.
        task: to be taught.
        vocab_size: rows of the student's word embedding.
        tokenizer: of the student, which both models are fed by.

    Raises:
        ConfigError: it cannot be read, or its positions are too few.
        ArchitectureError: other labels, another vocabulary, or weights that are quantized.
    """
    if config.teacher.path is None:
        return
    source = resolve_source(config.teacher.path)
    teacher = read_model_config(source, what="teacher")
    check_quantization("teacher", source, teacher)
    check_positions("teacher", config, teacher)
    _check_labels(task, source, teacher)
    if task.problem == "text" and teacher.vocab_size != vocab_size:
        raise ArchitectureError(
            f"teacher '{source}' has {teacher.vocab_size} tokens and model '{config.model.name}' has {vocab_size}: "
            "distillation compares their probabilities token by token"
        )
    _check_vocabulary(config, source, int(teacher.vocab_size), vocab_size, tokenizer.get_vocab())


def check_start(config: RunConfig, task: Task, model: PreTrainedModel, outputs: Mapping[str, Any]) -> None:
    """See that a student that starts as a copy of a given teacher is the model whose structure is read.

    Args:
        config: the run.
        task: to be taught.
        model: skeleton of `model.name`, whose units are to be pruned.
        outputs: what the configurations have to say of the head.

    Raises:
        ConfigError: the teacher is another model, naming what is unlike.
    """
    path = config.teacher.path
    if path is None or config.prune.start != "teacher" or "prune" not in config.stages:
        return
    pruned = compact_facts(resolve_source(path)) is not None
    unlike = "it is pruned already" if pruned else _unlike(skeleton(path, task, outputs=outputs), model)
    if unlike:
        raise ConfigError(
            f"prune.start = 'teacher': the student is to be a copy of teacher '{path}', which is another model than "
            f"model.name = '{config.model.name}' ({unlike}): set prune.start = 'pretrained', or give the model that "
            "the teacher was made from"
        )


def _unlike(teacher: PreTrainedModel, model: PreTrainedModel) -> str:
    """What tells a teacher from the model: all sizes of their configurations that differ, or the first parameter."""
    kinds = (teacher.config.model_type, model.config.model_type)
    if kinds[0] != kinds[1]:
        return f"its model_type is {kinds[0]}, not {kinds[1]}"
    keys = {
        key: [getattr(m.config, key, None) for m in (teacher, model)] for key in family_of(model.config).sizes.values()
    }
    sizes = [f"{key} {theirs}, not {ours}" for key, (theirs, ours) in keys.items() if theirs != ours]
    if sizes:
        return "; ".join(sizes)
    theirs, ours = ({name: tuple(param.shape) for name, param in m.named_parameters()} for m in (teacher, model))
    first = next((name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name)), None)
    return "" if first is None else f"{first} {theirs.get(first, 'missing')}, not {ours.get(first, 'missing')}"


def _check_labels(task: Task, source: str, teacher: PretrainedConfig) -> None:
    if task.problem == "text":
        return
    if teacher.num_labels != task.num_labels:
        raise ArchitectureError(
            f"teacher '{source}' has {teacher.num_labels} labels and task '{task.name}' has {task.num_labels}"
        )
    if task.labels:
        label_permutation(teacher.id2label, task.labels)  # names that match nothing; another order is mended at loading


def _check_vocabulary(config: RunConfig, source: str, rows: int, vocab_size: int, ours: dict[str, int]) -> None:
    """Teacher and student are fed the same ids, so a token must have the same id for both.

    Args:
        config: the run.
        source: of the teacher.
        rows: of the teacher's word embedding.
        vocab_size: rows of the student's.
        ours: the student's vocabulary.
    """
    theirs = _vocabulary(source)
    if theirs is None:
        if rows != vocab_size:
            raise ArchitectureError(
                f"teacher '{source}' has {rows} tokens, model '{config.model.name}' has {vocab_size}, and beside the "
                "teacher lies no tokenizer that could tell whether it reads the same ones: put its tokenizer there"
            )
        return
    unlike = [token for token, number in ours.items() if theirs.get(token) != number]
    if unlike:
        first = min(unlike, key=ours.__getitem__)
        there = f"{theirs[first]} there" if first in theirs else "not there"
        raise ArchitectureError(
            f"teacher '{source}' has another vocabulary than model '{config.model.name}': {len(unlike)} of {len(ours)} "
            f"tokens, the first is {first!r} ({ours[first]} here, {there}): give a teacher that reads the same tokens"
        )
    if rows <= max(ours.values()):
        raise ArchitectureError(
            f"teacher '{source}' has {rows} tokens and the tokenizer of '{config.model.name}' gives ids up to "
            f"{max(ours.values())}: give a teacher that reads the same tokens"
        )


def _vocabulary(source: str) -> dict[str, int] | None:
    """Tokens of a model's own tokenizer; None where it has none."""
    try:
        vocabulary: dict[str, int] = load_tokenizer(source).get_vocab()
    except ConfigError:
        return None
    return vocabulary


def check_positions(what: str, config: RunConfig, model: PretrainedConfig) -> None:
    """See that a model reads sequences as long as the recipe makes them, or times them.

    Args:
        what: "model" or "teacher".
        config: the run.
        model: its configuration.

    Raises:
        ConfigError: they are longer, naming what it reads at most.
    """
    usable = family_for(str(model.model_type).removeprefix("dsprune_")).usable_positions(model)
    if usable is None:
        return
    whole = int(model.max_position_embeddings)
    kept = f" (of {whole}, the first {whole - usable} are the padding's)" if usable < whole else ""
    lengths = {"task.max_length": config.task.max_length}
    if "evaluate" in config.stages and config.eval.bench_length is not None:
        lengths["eval.bench_length"] = config.eval.bench_length
    mistakes = [
        f"{key} = {length}: the {what} has {usable} positions{kept}: set it to {usable} or less"
        for key, length in lengths.items()
        if length > usable
    ]
    if mistakes:
        raise ConfigError(*mistakes)
