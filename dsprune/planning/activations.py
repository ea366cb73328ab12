"""What a training step holds beside the model's states: traced on the meta device, for any architecture.

The step runs there as it would anywhere, with shapes and without numbers, while every tensor that is made
is counted until it is freed. So the peak is that of the model's own code, its recomputations included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dsprune.distill import Question, TeacherStates, VocabularyHead, chunked_losses, layer_loss
from dsprune.engine.models.load import checkpoint_activations

__all__ = ["Build", "MicroStep", "TeacherPass", "layers_of", "stacks_of", "trace_step", "trace_teacher"]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of the tensors made while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: set[Any] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)

        def forget(reference: Any) -> None:
            self.now -= self._sizes.pop(key)
            self._watched.discard(reference)

        self._watched.add(weakref.ref(storage, forget))


class _FusedAttention(Function):
    """Holds what fused attention kernels hold: inputs, output, and one number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    output: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output


@contextmanager
def _tracing() -> Iterator[LiveBytes]:
    """Counting, with the attention that runs on real devices: on meta, torch would take the unfused one."""
    fused = patch.object(F, "scaled_dot_product_attention", _fused_attention)
    # It looks for packed sequences in the values of position ids, and here nothing has values.
    unpacked = patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)
    # Likewise for padding, in token ids that come without a mask.
    unpadded = patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None)
    with fused, unpacked, unpadded, torch.device("meta"), LiveBytes() as live:
        yield live


@dataclass(frozen=True)
class MicroStep:
    """One micro-batch of one rank.

    Attributes:
        batch: sequences.
        length: tokens of each.
        dtype: of the activations.
        chunk: tokens whose logits exist at a time, where the model has a vocabulary's.
        checkpointing: compute the layers' activations again in the backward pass.
    """

    batch: int
    length: int
    dtype: torch.dtype
    chunk: int
    checkpointing: bool = False

    def inputs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Arguments of a model, shapes alone."""
        ids = torch.zeros((self.batch, self.length), dtype=torch.int64)
        return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


@dataclass(frozen=True)
class TeacherPass:
    """What a teacher brings to a student's step.

    Attributes:
        width: of its hidden states.
        partners: for each of its layers that teach, the layer of the student that learns from it, counted from 1 over
            all stacks; 0 stands for the embeddings.
        gathers_head: its head is sharded, and whole while the losses are made.
    """

    width: int
    partners: tuple[int, ...]
    gathers_head: bool


Build = Callable[[], PreTrainedModel]
"""Makes a model on the device that is the default."""


def trace_step(build: Build, micro: MicroStep, lecture: TeacherPass | None) -> int:
    """Peak bytes of a student's forward and backward pass.

    Args:
        build: makes the student.
        micro: what goes through it.
        lecture: with the losses of distillation; None for the task's loss alone.
    """
    with torch.device("meta"):
        model = build().to(micro.dtype).train()
    if micro.checkpointing:
        checkpoint_activations(model)
    for param in model.parameters():
        # ZeRO takes a weight's gradient as soon as it is there: states count it, not the activations.
        param.register_post_accumulate_grad_hook(_drop_gradient)
    caught = _caught(model, () if lecture is None else range(len(layers_of(model)) + 1))
    with _tracing() as live:
        if lecture is None:
            _loss(model, micro, None).backward()  # type: ignore[no-untyped-call]
            return live.peak
        tokens = micro.batch * micro.length
        taught = torch.empty((len(lecture.partners), tokens, lecture.width), dtype=micro.dtype)
        loss = _loss(model, micro, lecture)
        # Of every layer the real tokens are taken, whichever learn.
        index = torch.zeros(tokens, dtype=torch.int64)
        states = {layer: torch.index_select(state.flatten(0, 1), 0, index) for layer, state in caught.items()}
        caught.clear()
        learned = torch.stack([states[layer] for layer in lecture.partners])
        projection = torch.empty((lecture.width, learned.shape[-1]), dtype=micro.dtype, requires_grad=True)
        target = torch.stack(list(taught))
        loss = loss + layer_loss(F.linear(learned, projection), target, num_tokens=torch.ones(()))
        del states, learned, target
        loss.backward()  # type: ignore[no-untyped-call]
        return live.peak


def _caught(model: PreTrainedModel, numbers: Iterable[int]) -> dict[int, Tensor]:
    """Where the outputs of layers, counted from 1, come with every forward pass; 0 stands for the embeddings."""
    caught: dict[int, Tensor] = {}
    modules = [model.get_input_embeddings(), *layers_of(model)]

    def hook(number: int) -> Any:
        def catch(_module: nn.Module, _args: Any, output: Any) -> None:
            caught[number] = output[0] if isinstance(output, tuple) else output

        return catch

    for number in numbers:
        modules[number].register_forward_hook(hook(number))
    return caught


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a stock model, stack after stack."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def stacks_of(model: nn.Module) -> tuple[int, ...]:
    """For each of these layers, the stack that it stands in."""
    names = {module: name for name, module in model.named_modules()}
    places = [names[layer].rpartition(".")[0] for layer in layers_of(model)]
    return tuple(list(dict.fromkeys(places)).index(place) for place in places)


def trace_teacher(build: Build, micro: MicroStep, layers: Sequence[int]) -> int:
    """Peak bytes of a teacher's forward pass; its logits over a vocabulary are never made.

    Args:
        build: makes the teacher.
        micro: what goes through it.
        layers: that teach, counted from 1, whose outputs are held; 0 stands for the embeddings.
    """
    with torch.device("meta"):
        model = build().to(micro.dtype).eval()
    caught = _caught(model, layers)
    head = model.get_output_embeddings()
    with _tracing() as live, torch.no_grad():
        if head is None:
            model(**micro.inputs(model))
        else:
            VocabularyHead(head).ask(lambda hidden, *_: hidden, model, **micro.inputs(model))
        held = [state.flatten(0, 1).clone() for state in caught.values()]  # of the real tokens
        del held
        return live.peak


def _drop_gradient(param: Tensor) -> None:
    param.grad = None


def _loss(model: PreTrainedModel, micro: MicroStep, lecture: TeacherPass | None) -> Tensor:
    """A loss of the size and history of the real one."""
    head = model.get_output_embeddings()
    if head is None:
        outputs = model(**micro.inputs(model))
        return torch.stack([value.float().sum() for value in outputs.values() if isinstance(value, Tensor)]).sum()
    question = _vocabulary_question(micro, lecture)
    total: Tensor = VocabularyHead(head).ask(question, model, **micro.inputs(model))[0]
    return total


def _vocabulary_question(micro: MicroStep, lecture: TeacherPass | None) -> Question:
    """The losses of all tokens, by chunks; of a lecture, from the teacher's last hidden states and head."""
    tokens = micro.batch * micro.length
    labels = torch.zeros(tokens, dtype=torch.int64)

    def question(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        teacher = None
        if lecture is not None:
            rows = len(weight)
            # A head that is whole anyway is counted with the teacher's weights: one row for all stands for it here.
            theirs = weight.new_empty((rows if lecture.gathers_head else 1, lecture.width)).expand(rows, lecture.width)
            teacher = TeacherStates(hidden.new_empty((tokens, lecture.width)), theirs, None)

        def losses(logits: Tensor, rows: slice) -> Tensor:
            if teacher is not None:
                return teacher.divergence(logits, rows, 2.0)[None]
            return F.cross_entropy(logits, labels[rows], reduction="sum")[None]

        return chunked_losses(hidden.flatten(0, 1), weight, bias, losses, torch.ones(1), chunk=micro.chunk)

    return question
