"""The label order of a model that somebody else fine-tuned, against the task's.

Released models for one task differ in their order (MNLI is notorious): rows of a head are matched by label name, never
by position alone where names are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dsprune.errors import ArchitectureError

__all__ = ["has_default_names", "label_permutation"]


def has_default_names(id2label: Mapping[int, str]) -> bool:
    """Whether a model's labels are called `LABEL_0`, `LABEL_1`, ..., as by a configuration that names none."""
    return _names(id2label) == [f"LABEL_{index}" for index in range(len(id2label))]


def label_permutation(id2label: Mapping[int, str], labels: Sequence[str]) -> list[int] | None:
    """The permutation that puts a head's rows, or its logits, into the task's order: `logits[:, permutation]`.

    Names are compared without regard to case, spaces, hyphens and underscores.

    Args:
        id2label: the model's `config.id2label`.
        labels: the task's class names in order.

    Returns:
        None where the order is the same, or where the model has default names and its order has to be believed.

    Raises:
        ArchitectureError: another number of labels, or names that do not match.
    """
    names = _names(id2label)
    if len(names) != len(labels):
        raise ArchitectureError(
            f"the model has {len(names)} labels ({', '.join(names)}) and the task {len(labels)} ({', '.join(labels)})"
        )
    if has_default_names(id2label):
        return None
    # What tells two names of the task apart is not passed over: -1 is not 1.
    spelt = str if set(names) == set(labels) else _canonical
    position = {spelt(name): index for index, name in enumerate(names)}
    wanted = [spelt(label) for label in labels]
    if len(position) < len(names) or set(position) != set(wanted):
        raise ArchitectureError(
            f"the model's labels ({', '.join(names)}) are not the task's ({', '.join(labels)}): "
            "rename id2label in the model's config.json"
        )
    permutation = [position[label] for label in wanted]
    return None if permutation == list(range(len(labels))) else permutation


def _names(id2label: Mapping[int, str]) -> list[str]:
    return [str(id2label[index]) for index in sorted(id2label)]


def _canonical(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()
