"""Tasks whose answers are tokens of text: their outputs are too many to keep, so losses come from the model's head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsprune.config import DataConfig
from dsprune.distill import VocabularyHead
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.tasks.base import Problem, Task
from dsprune.tasks.sources import HubData

__all__ = ["TextTask", "end_of_text", "eval_splits", "named_data"]


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A task over the vocabulary; a label is the token that the model is to give at a position.

    Attributes:
        chunk: tokens whose logits exist at a time.
    """

    chunk: int

    @property
    def problem(self) -> Problem:
        """Tokens of text."""
        return "text"

    def arguments(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The model's arguments, those that come from the labels included; by default there are none.

        Args:
            model: whose arguments are wanted.
            inputs: of a batch, as `Encoded.collate` gives them.
            labels: of the batch.
        """
        return dict(inputs)

    @abstractmethod
    def predict(self, model: Any, head: VocabularyHead, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """What metrics are made of: [batch, n], as wide for every batch. Collective under ZeRO-3.

        Args:
            model: or what runs it.
            head: of the model.
            inputs: of a batch, as `Encoded.collate` gives them.
            labels: of the batch.
        """


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text.

    Raises:
        ArchitectureError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ArchitectureError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no end-of-sequence token: name one (eos_token) in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def named_data(task: str, data: DataConfig, default: HubData | None) -> HubData:
    """The data set of the hub that the user names, or the default.

    Raises:
        ConfigError: none is named, and there is neither a default nor a local folder.
    """
    if data.dataset is not None:
        return HubData(data.dataset, data.subset)
    if data.subset is not None:
        raise ConfigError(f"data.subset = '{data.subset}': of which data set? give data.dataset as well")
    if default is None and data.path is None:
        raise ConfigError(
            f"task '{task}' has no data set of its own: give data.dataset, or a local folder as data.path"
        )
    return default or HubData("")


def eval_splits(data: DataConfig) -> dict[str, str]:
    """Evaluation splits by their names in figures.

    Raises:
        ConfigError: none but the test split, which must not pick the best model.
    """
    if not set(data.evals) - {"test"} or len(set(data.evals)) < len(data.evals):
        raise ConfigError(f"data.evals = {list(data.evals)}: name each split once, and one beside 'test'")
    return {split: split for split in data.evals}
