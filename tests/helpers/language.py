"""Training of tiny language models on random text, built from the engine's own parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dsprune.config import DistillConfig, OptimConfig, TaskConfig
from dsprune.tasks.batching import Encoded, Tokens
from dsprune.tasks.kinds.causal import PackedText
from dsprune.tasks.kinds.corruption import CorruptedText, Noise
from dsprune.tasks.kinds.seq2seq import TextPairs
from dsprune.tasks.losses import IGNORED
from tests.helpers.settings import ROWS
from tests.helpers.training import Setting, pruning, without_dropout

VOCABULARY = 50


def llama_config(vocab_size: int, *, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )


def tiny_llama(*, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(VOCABULARY, tied=tied))


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config)


TASKS = {"t5": "seq2seq", "t5-spans": "span_corruption"}
"""What an encoder-decoder does, by its name in `Language`."""
DECODERS = {"llama": tiny_llama, "llama-tied": lambda: tiny_llama(tied=True), "gpt2": tiny_gpt2}


def drawn(model: nn.Module, seed: int) -> Any:
    """The model with weights drawn anew, large enough that differences show."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=generator) * 0.2
    return without_dropout(model)


@dataclass(frozen=True)
class Language(Setting):
    """A way of running the same training of a language model."""

    model: str = "llama"
    distill: tuple[tuple[str, Any], ...] = (("logits", 0.6), ("labels", 0.4))
    taught: bool = True
    method: int | None = None
    """Which row of `tests.helpers.settings.ROWS` prunes; None trains without gates."""


def _tokens(count: int, shortest: int, longest: int, pad: int, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (count,), generator=generator)
    ids = torch.randint(3, VOCABULARY, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    return Tokens(ids, lengths, pad)


def random_text(task: str, count: int = 64) -> Encoded:
    """Sequences of several lengths, so that ranks have unequally many targets."""
    tokens = _tokens(count, 4, 12, 0, seed=5)
    if task == "seq2seq":
        answers = _tokens(count, 2, 7, IGNORED, seed=6)
        return TextPairs("train", tokens, answers, references=(), tokenizer=None, notes=())
    if task == "span_corruption":
        ends = {"sentinels": range(VOCABULARY - 5, VOCABULARY), "end": 1, "seed": 3}
        return CorruptedText("train", tokens, noise=Noise(0.3, 2.0), **ends)
    labels = tokens.input_ids.roll(-1)
    labels[::5] = IGNORED  # as at the end of a stream, only more often
    text = PackedText("train", tokens, labels, num_words=100)
    text.targets = torch.stack([(part != IGNORED).sum() for part in labels.split(tokens.lengths.tolist())])
    return text


def build_language_trainer(setup: Language, *, steps: int = 4) -> Any:
    """A trainer that distils a decoder, or a T5. Collective; call inside a rank of `run_world`."""
    from dsprune.engine.learning.batches import Batches
    from dsprune.engine.learning.replica import Replica
    from dsprune.engine.learning.student import Student, build_student_engine
    from dsprune.engine.learning.trainer import LayerMatcher, Trainer
    from dsprune.engine.models.load import checkpoint_activations
    from dsprune.engine.ranks.world import start_world
    from dsprune.tasks import build_task

    world = start_world()
    name = TASKS.get(setup.model, "lm")
    task = build_task(TaskConfig(name=name, logits_chunk=5, max_target_length=5), _data(name), seed=0)
    batch, ds_config = setup.plan(world)
    build = {**DECODERS, "t5": tiny_t5, "t5-spans": tiny_t5}[setup.model]
    row = None if setup.method is None else ROWS[setup.method]
    layers = row.teacher_layers if row else ()
    rows = dict(row.distill) if row else {}
    if row and setup.model in TASKS:  # a decoder's layers follow the encoder's, and no maps are compared
        layers, rows = (*layers, 3, 4), rows | {"attentions": 0.0}
    distill = DistillConfig(**{"layers": 0.9 if row else 0.0, **dict(setup.distill), **rows})
    teacher = setup.build_teacher(drawn(build(), 7), task, world, layers=layers) if setup.taught else None
    model = drawn(build(), 3)
    if setup.activation_checkpointing:
        checkpoint_activations(model)
    method, gating = None, None
    if row:
        method, gating = pruning(row.name, row.options, row.target, model, total=row.steps)
    student = Student(
        model, task, distill=distill if setup.taught else None, teacher=(32, layers) if row else None, gating=gating
    )
    engine = build_student_engine(student, ds_config, lr=1e-3, weight_decay=0.01)
    return Trainer(
        stage="prune",
        engine=engine,
        world=world,
        batches=Batches(random_text(name), batch, world, seed=0),
        optim=OptimConfig(lr=1e-3),
        total_steps=row.steps if row else steps,
        seed=0,
        teacher=teacher,
        matcher=LayerMatcher(rows["match"], layers, range(len(teacher.layer_stacks)), teacher.layer_stacks)
        if row and teacher
        else None,
        replica=Replica(method) if method else None,
    )


def _data(task: str) -> Any:
    from dsprune.config import DataConfig

    return DataConfig(dataset="none") if task == "seq2seq" else DataConfig()


def language_losses(setup: Language) -> list[dict[str, float]]:
    """Losses of every step. Runs on every rank."""
    trainer = build_language_trainer(setup)
    return [trainer.step(step).losses for step in range(trainer.total_steps)]
