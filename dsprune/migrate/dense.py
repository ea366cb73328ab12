"""The dense model that a foreign one was: its configuration under transformers' own names, and its structure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsprune.consolidate import EMBEDDING_RANK, without_weights
from dsprune.consolidate.modeling_dsprune import FAMILIES
from dsprune.errors import ArchitectureError, CheckpointError
from dsprune.files import first_line
from dsprune.migrate.foreign import Foreign, listed
from dsprune.structure import Structure, analyze

__all__ = ["Dense", "dense_model", "parameters"]

MODEL_TYPES = ("bert", "roberta")
"""What the authors' code prunes."""
FOREIGN_KEYS = (
    *("architectures", "model_type", "num_labels", "id2label", "label2id", "pruned_heads", "transformers_version"),
    *("do_distill", "do_layer_distill", "transform_embedding", "proj_size"),
    *("pruning_method", "mask_init", "mask_scale", "head_pruning", "torch_dtype", "dtype", "output_hidden_states"),
)
"""Keys of their configurations that are set anew, or that only their code reads."""
EXTRAS = ("layer_transformation.", "mha_layer_transformation.")
"""Weights of distillation, which the model does not need."""
BUFFERS = (".position_ids", ".embeddings.token_type_ids")


@dataclass(frozen=True)
class Dense:
    """A dense model without weights.

    Attributes:
        config: config.json.
        structure: its parameters and spaces.
    """

    config: dict[str, Any]
    structure: Structure

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter."""
        return {name: param.shape for name, param in self.structure.params.items()}

    def state(self, foreign: Foreign, weights: Mapping[str, Tensor], gone: Collection[str] = ()) -> dict[str, Tensor]:
        """The model's parameters from tensors by the same names; see `parameters`."""
        return parameters(foreign, weights, self.shapes, self.config["architectures"][0], gone)


def parameters(
    foreign: Foreign,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    owner: str,
    gone: Collection[str] = (),
) -> dict[str, Tensor]:
    """A model's parameters, fp32, from tensors by the same names.

    Args:
        foreign: where they are from, for messages.
        weights: by name; those of distillation and buffers are left out.
        shapes: of the parameters.
        owner: class of the model, for messages.
        gone: parameters that may be missing, which are zero.

    Raises:
        CheckpointError: tensors that are missing, too many or of other shapes.
    """
    missing = [name for name in shapes if name not in weights and name not in gone]
    if missing:
        raise CheckpointError(f"{foreign.path} lacks {listed(missing)}, which a {owner} has")
    unknown = [name for name in weights if name not in shapes and not _is_extra(name)]
    if unknown:
        raise CheckpointError(f"{foreign.path} holds {listed(unknown)}, which a {owner} does not have")
    for name, shape in shapes.items():
        if name in weights and tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{foreign.path}: {name} has shape {list(weights[name].shape)}, and a {owner} has {list(shape)} there"
            )
    return {
        name: weights[name].float().contiguous() if name in weights else torch.zeros(shape)
        for name, shape in shapes.items()
    }


def _is_extra(name: str) -> bool:
    return name.startswith(EXTRAS) or name.endswith(BUFFERS)


def dense_model(foreign: Foreign, *, labels: Sequence[str] = (), embedding_rank: int | None = None) -> Dense:
    """The dense model of a foreign one's names and configuration.

    Args:
        foreign: as it was found.
        labels: class names in the order of the model's outputs; by default those of its configuration.
        embedding_rank: of its word embedding, where that is factored.

    Raises:
        ArchitectureError: not a BERT or RoBERTa with a head that dsprune knows, or labels that are not as many.
    """
    model_type = _model_type(foreign)
    stem, _ = FAMILIES[model_type]
    head, outputs = _head(foreign)
    config = {key: value for key, value in foreign.config.items() if key not in FOREIGN_KEYS}
    config |= {"model_type": model_type, "architectures": [f"{stem}{head}"], **_labels(foreign, outputs, labels)}
    if embedding_rank is not None:
        config[EMBEDDING_RANK] = embedding_rank
    try:
        model = without_weights(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArchitectureError(
            f"the configuration of {foreign.folder} describes no model: {first_line(error)}"
        ) from error
    whole = model.config.to_dict()  # type: ignore[union-attr, operator]
    return Dense({**whole, **config, "num_labels": outputs}, analyze(model))


def _model_type(foreign: Foreign) -> str:
    """By the configuration, or by the names of the weights where that is older than the key."""
    named = str(foreign.config.get("model_type", "")).removeprefix("masked_")
    bases = {name.partition(".")[0] for name in foreign.weights if ".embeddings." in name}
    found = named or next((base for base in bases if base in MODEL_TYPES), "unknown")
    if found not in MODEL_TYPES or bases != {found}:
        raise ArchitectureError(
            f"{foreign.path} is no model of the authors' code: expected a BERT or RoBERTa, with weights such as "
            f"bert.embeddings.word_embeddings.weight; found {listed(list(foreign.weights))}"
        )
    return found


def _head(foreign: Foreign) -> tuple[str, int]:
    """What the model's class ends with, and how many outputs it has."""
    names = foreign.weights
    for last, head in (("qa_outputs", "ForQuestionAnswering"), ("classifier.out_proj", "ForSequenceClassification")):
        if f"{last}.weight" in names:
            return head, len(names[f"{last}.weight"])
    if "classifier.weight" not in names:
        raise ArchitectureError(f"{foreign.path} has no head of a task (classifier or qa_outputs)")
    pooled = any(".pooler." in name for name in names)
    return "ForSequenceClassification" if pooled else "ForTokenClassification", len(names["classifier.weight"])


def _labels(foreign: Foreign, outputs: int, labels: Sequence[str]) -> dict[str, Any]:
    """Names of the outputs: those that are given, those of the configuration, or none that say anything."""
    if labels and len(labels) != outputs:
        raise ArchitectureError(f"--labels names {len(labels)} classes, and {foreign.path} has {outputs} outputs")
    own = foreign.config.get("id2label") or {}
    names = list(labels) or [str(own[index]) for index in sorted(own, key=int)]
    if len(names) != outputs:
        names = [f"LABEL_{index}" for index in range(outputs)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
