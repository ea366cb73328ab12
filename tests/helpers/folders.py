"""A tiny dense model folder and a recipe that trains it in seconds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerFast,
    T5Config,
)

from dsprune.tasks.benchmarks.order import generate
from tests.helpers.language import llama_config
from tests.helpers.models import T5_SIZES

RECIPE = """
output = "{output}"
[model]
name = "{model}"
[task]
name = "order"
max_length = 32
[data]
max_train_examples = 64
max_eval_examples = 20
[batch]
size = 8
eval = 8
[teacher]
duration = "2 steps"
[prune]
target = 0.5
duration = "6 steps"
{method}
[recover]
duration = "2 steps"
[deepspeed]
student = "zero3"
teacher = "teacher_zero3"
[eval]
every = "4 steps"
bench_batch = 2
bench_length = 16
[checkpoint]
every = "4 steps"
[log]
every = 1
"""

METHODS = {
    "cofi": """
[method]
name = "cofi"
distill_phase = "1 steps"
warmup = "3 steps"
lr = 0.1
[distill]
labels = 0.1
""",
    "fisher": """
start = "teacher"
[method]
name = "fisher"
""",
    "grain": """
embedding_rank = 8
[method]
name = "grain"
start = 0.2
end = 0.7
[distill]
logits = 1.0
logit_scale = "none"
temperature = 8.0
layers = 1.0
match = "fixed"
projection = "separate"
teacher_layers = [0, 1, 2]
""",
    "mlpruning": """
[method]
name = "mlpruning"
lr = 0.5
init = 3.0
[distill]
labels = 0.1
logits = 0.9
layers = 0.9
attentions = 0.9
match = "fixed"
projection = "none"
teacher_layers = [0, 1, 2]
[blocks]
duration = "4 steps"
target = 0.5
shape = [8, 8]
scores_lr = 0.5
init = 3.0
""",
}
"""What stands under [prune] and after it, for each method."""


LANGUAGE = """
output = "{output}"
[model]
name = "{model}"
from_scratch = true
[task]
name = "{task}"
max_length = 32
logits_chunk = 20
[data]
path = "{data}"
[batch]
size = 8
eval = 8
[teacher]
duration = "8 steps"
lr = 3e-3
[prune]
target = 0.5
duration = "6 steps"
start = "teacher"
lr = 1e-3
{method}
[recover]
duration = "2 steps"
[student]
activation_checkpointing = true
[deepspeed]
student = "zero3"
teacher = "teacher_zero3"
[eval]
every = "20 steps"
bench_batch = 2
bench_length = 16
[checkpoint]
every = "20 steps"
[log]
every = 1
tensorboard = false
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of the generated task."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, ".": 4}
    for example in generate(42, num_train=2000, num_validation=100)[0]:
        for word in f"{example.premise} {example.hypothesis}".lower().replace(".", " ").split():
            vocabulary.setdefault(word, len(vocabulary))
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_folder(folder: Path) -> Path:
    """A tiny BERT encoder with its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


SIDE_FILES = {
    "generation_config.json": json.dumps({"do_sample": True, "top_p": 0.8, "eos_token_id": [3, 4]}),
    "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "tokenizer.model": "pieces",
    "vocab.txt": "[PAD]\n[UNK]\n",
    "processor_config.json": "{}",
    "preprocessor_config.json": "{}",
}
"""Files that lie beside the weights of published models."""


def fine_tuned_folder(folder: Path, labels: Sequence[str], *, seed: int = 4) -> Path:
    """`tiny_folder` with a head for these labels, and with all that lies beside a published model."""
    tiny_folder(folder)
    names = dict(enumerate(labels))
    config = BertConfig.from_pretrained(folder, id2label=names, label2id={name: i for i, name in names.items()})
    model = BertForSequenceClassification(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():  # large enough that its answers hang on the order of the words
        if "LayerNorm" not in name:
            param.data = torch.randn(param.shape, generator=generator) * 0.3
    examples = [(one.premise, one.hypothesis) for one in generate(42, num_train=64, num_validation=1)[0]]
    with torch.no_grad():  # each answer about as often as the other
        batch = tiny_tokenizer()(*map(list, zip(*examples, strict=True)), padding=True, return_tensors="pt")
        model.classifier.bias -= model(**batch).logits.median(0).values
    model.save_pretrained(folder)
    for name, content in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def sentencepiece_folder(folder: Path) -> Path:
    """A tiny DeBERTa-v3 encoder with a sentencepiece vocabulary, in the files in which such models are published."""
    text = [f"{example.premise} {example.hypothesis}" for example in generate(42, num_train=500, num_validation=1)[0]]
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=pieces,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        pad_piece="[PAD]",
        bos_id=1,
        bos_piece="[CLS]",
        eos_id=2,
        eos_piece="[SEP]",
        unk_id=3,
        unk_piece="[UNK]",
        minloglevel=2,
    )
    config = DebertaV2Config(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        position_biased_input=False,
        norm_rel_ebd="layer_norm",
    )
    DebertaV2Model(config).save_pretrained(folder)
    (folder / "spm.model").write_bytes(pieces.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    return folder


def language_recipe(folder: Path, *, method: str = "cofi") -> Path:
    """A recipe of all stages on a tiny Llama without weights and on text of a few hundred words, in one folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "dense")
    config = llama_config(len(tokenizer), tied=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "dense")
    (folder / "text").mkdir()
    examples = generate(7, num_train=400, num_validation=60)
    for split, part in zip(("train", "validation"), examples, strict=True):
        rows = [json.dumps({"text": f"{example.premise} {example.hypothesis}"}) for example in part]
        (folder / "text" / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    path = folder / "language.toml"
    places = {"model": folder / "dense", "data": folder / "text", "output": folder / "run"}
    path.write_text(LANGUAGE.format(**places, task="lm", method=METHODS[method].strip()), encoding="utf-8")
    return path


def encoder_decoder_recipe(folder: Path, *, task: str, method: str = "cofi", **sizes: Any) -> Path:
    """A recipe of all stages on a tiny T5 without weights, for one of the tasks of encoder-decoders."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(6)]})
    tokenizer.save_pretrained(folder / "dense")
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = T5Config(**{**T5_SIZES, **ids, **sizes})
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(folder / "dense")
    (folder / "text").mkdir()
    examples = generate(7, num_train=400, num_validation=40)
    for split, part in zip(("train", "validation"), examples, strict=True):
        rows = [
            {"source": one.premise, "target": one.hypothesis, "text": f"{one.premise} {one.hypothesis}"} for one in part
        ]
        (folder / "text" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = folder / "written.toml"
    places = {"model": folder / "dense", "data": folder / "text", "output": folder / "run"}
    text = LANGUAGE.format(**places, task=task, method=METHODS[method].strip())
    path.write_text(text.replace("attentions = 0.9\n", ""), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, *, output: Path | None = None, method: str = "cofi") -> Path:
    """A recipe of all stages on `tiny_folder`, in the same folder."""
    model = folder / "dense"
    if not model.exists():
        tiny_folder(model)
    path = folder / "tiny.toml"
    text = RECIPE.format(model=model, output=output or folder / "run", method=METHODS[method].strip())
    path.write_text(text, encoding="utf-8")
    return path
