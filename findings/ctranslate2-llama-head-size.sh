#!/usr/bin/env bash
# CTranslate2 4.8.5: a Llama whose head_dim is not hidden_size / heads is converted without a word and answers wrongly.
#
# `head_dim` is a key of the configuration of its own (models with other head sizes are published, pruned ones too). The
# converter leaves it out and the engine divides: logits of the same weights then differ by more than 10% of their range,
# while they agree to 1e-4 where head_dim is hidden_size / heads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet ctranslate2==4.8.5 torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6

cat >"$work/probe.py" <<'PROBE'
import tempfile

import ctranslate2
import numpy
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
TOKENS = ["<unk>", "<s>", "</s>"] + [f"w{number}" for number in range(3, 40)]
PROMPT = [3, 7, 11, 5, 9]


def difference(head_dim):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=40)
    model = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=head_dim, initializer_range=0.3)).eval()
    words = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ctranslate2.converters.TransformersConverter(folder).convert(f"{folder}/converted")
        generator = ctranslate2.Generator(f"{folder}/converted")
        answer = numpy.array(generator.forward_batch([[TOKENS[number] for number in PROMPT]]))[0]
    with torch.no_grad():
        truth = model(torch.tensor([PROMPT])).logits[0].numpy()
    return float(abs(answer - truth).max()), float(abs(truth).max())


print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
seen = {head_dim: difference(head_dim) for head_dim in (8, 16, 4)}
for head_dim, (off, largest) in seen.items():
    print(f"hidden 32, 4 heads, head_dim {head_dim}: largest logit {largest:.2f}, off by {off:.1e}")
assert seen[8][0] < 1e-4, "the ordinary head size no longer agrees"
assert all(seen[head_dim][0] > 0.1 * seen[head_dim][1] for head_dim in (16, 4)), "other head sizes are right now"
print("seen: other head sizes are converted and answer wrongly")
PROBE
"$venv/bin/python" "$work/probe.py"
