#!/usr/bin/env bash
# transformers 5.23.0: `head_mask` no longer masks heads, and is accepted all the same.
#
# Up to version 4 `BertModel(..., head_mask=...)` switched attention heads off: what head pruning and head importance were
# measured with. Version 5 has no such argument, but forward takes any keyword: the call works, masks nothing, and old
# code finds that no head matters. A `pruned_heads` in the configuration is kept and pays no attention either: the model
# is built with all heads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6

cat >"$work/probe.py" <<'PROBE'
import torch
import transformers
from transformers import BertConfig, BertModel

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=20)
model = BertModel(BertConfig(**sizes)).eval()
tokens = torch.arange(8).unsqueeze(0)
with torch.no_grad():
    whole = model(tokens).last_hidden_state
    masked = model(tokens, head_mask=torch.zeros(2, 2)).last_hidden_state
pruned = BertModel(BertConfig(**sizes, pruned_heads={0: [1]}))
rows = pruned.encoder.layer[0].attention.self.query.weight.shape[0]

print("transformers", transformers.__version__, "torch", torch.__version__)
print("difference with every head masked:", (whole - masked).abs().max().item())
print(f"query rows of a layer with pruned_heads {pruned.config.pruned_heads}: {rows} of 16")
assert torch.equal(whole, masked), "head_mask has an effect now"
assert rows == 16, "pruned_heads has an effect now"
print("seen: both are accepted and ignored")
PROBE
"$venv/bin/python" "$work/probe.py"
