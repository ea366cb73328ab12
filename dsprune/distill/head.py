"""The output head of a language model, asked for losses instead of logits.

Inside the head's own forward its weight is whole, under ZeRO-3 as well, and it is told the last hidden
states. So that is where a question about the logits is answered, and the logits never are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["Question", "VocabularyHead"]

Question = Callable[[Tensor, Tensor, Tensor | None], Any]
"""Last hidden states [batch, length, width], weight [vocabulary, width] and bias of the head, to any tensors."""


class VocabularyHead:
    """The head of one model; made before the model becomes an engine.

    Args:
        module: the linear that gives the logits, from `get_output_embeddings()`.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._logits = module.forward
        self._question: Question | None = None
        module.forward = self._forward  # type: ignore[method-assign, assignment]

    def ask(self, question: Question, model: Callable[..., Any], **inputs: Tensor) -> Any:
        """Run a model's forward pass, and put a question in the place of its logits.

        Args:
            question: answered once, inside the head's forward.
            model: whose head this is.
            inputs: of the model.

        Returns:
            What the question gives.
        """
        self._question = question
        try:
            return model(**inputs).logits
        finally:
            self._question = None

    def _forward(self, hidden: Tensor) -> Any:
        if self._question is None:
            return self._logits(hidden)
        return self._question(hidden, self.module.weight, self.module.bias)
