#!/usr/bin/env bash
# transformers 5.23.0: the state of a compiled model loads as random weights, each time others, and nothing is raised.
#
# `torch.compile(model).state_dict()` puts `_orig_mod.` before every name. Written as model.safetensors beside the
# configuration, `from_pretrained` matches none of the names, fills every weight at random and returns the model; only a
# table in the log tells. (`strict=True` has no counterpart; `output_loading_info=True` lists the missing keys.)
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
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20)
model = BertModel(BertConfig(**sizes))
with tempfile.TemporaryDirectory() as folder:
    model.config.save_pretrained(folder)
    save_file(torch.compile(model).state_dict(), f"{folder}/model.safetensors", metadata={"format": "pt"})
    first, second = BertModel.from_pretrained(folder), BertModel.from_pretrained(folder)
    info = BertModel.from_pretrained(folder, output_loading_info=True)[1]


def query(net):
    return net.encoder.layer[0].attention.self.query.weight


print("transformers", transformers.__version__, "torch", torch.__version__)
for name, net in {"saved": model, "loaded": first, "loaded again": second}.items():
    print(f"{name}: first query weights {[round(value, 4) for value in query(net)[0, :3].tolist()]}")
print(f"missing {len(info['missing_keys'])} of {len(model.state_dict())} weights")
assert not torch.allclose(query(model), query(first)), "the prefix is understood now"
assert not torch.allclose(query(first), query(second)), "missing weights are not random any more"
print("seen: nothing raised, all weights random")
PROBE
"$venv/bin/python" "$work/probe.py"
