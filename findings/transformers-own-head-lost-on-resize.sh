#!/usr/bin/env bash
# transformers 5.23.0: an output head of its own, loaded beside `tie_word_embeddings: true`, is lost by a later call.
#
# Where the file holds an lm_head that differs from the embedding, `from_pretrained` keeps both apart (a line in the log
# says so), and `save_pretrained` writes both, but the configuration goes on saying that they are tied. So the next
# `resize_token_embeddings`, even to one more token, ties them: the head is gone, and nothing is said.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6

cat >"$work/probe.py" <<'PROBE'
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20)
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
head = torch.randn(20, 16)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    weights = load_file(f"{folder}/model.safetensors")
    save_file({**weights, "lm_head.weight": head}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    loaded = LlamaForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(folder)
    saved = load_file(f"{folder}/model.safetensors")

print("transformers", transformers.__version__, "torch", torch.__version__)
kept = torch.equal(loaded.lm_head.weight, head) and torch.equal(saved["lm_head.weight"], head)
print("loaded and saved again with its own head:", kept, "/ tie_word_embeddings:", loaded.config.tie_word_embeddings)
loaded.resize_token_embeddings(21)
tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
print("after resize_token_embeddings(21): head is the embedding:", tied)
assert kept and loaded.config.tie_word_embeddings, "loading or saving has changed"
assert tied and not torch.equal(loaded.lm_head.weight[:20], head), "the head survives now"
print("seen: the head was replaced by the embedding")
PROBE
"$venv/bin/python" "$work/probe.py"
