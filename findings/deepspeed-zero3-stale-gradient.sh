#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO-3: a parameter that a step does not reach gets the gradient of the last step that did.
#
# Two linears, of which a step uses one. Under ZeRO-1 the other has a gradient of zero in that step; under ZeRO-3 its
# gradient partition still holds what the step before left there, and plain SGD moves it once more. Nothing is said.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$venv/torch_extensions" PATH="$venv/bin:$PATH"

cat >"$work/probe.py" <<'PROBE'
import os
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
stage = int(sys.argv[1])
torch.manual_seed(0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x, both):
        y = self.first(x).sum()
        return y + self.second(x).sum() if both else y


net = Net()
config = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
moved = []
for both in (True, False):
    before = safe_get_full_fp32_param(engine.module.second.weight).clone()
    engine.backward(engine(torch.ones(2, 4), both))
    engine.step()
    after = safe_get_full_fp32_param(engine.module.second.weight)
    moved.append(round(float((after - before).abs().max()), 4))
print(f"deepspeed {deepspeed.__version__} ZeRO-{stage}: second moved by {moved[0]} when used, by {moved[1]} when not", flush=True)
assert moved[0] > 0
assert (moved[1] > 0) == (stage == 3), "what a step does not reach is treated otherwise now"
PROBE
for stage in 1 2 3; do "$venv/bin/python" "$work/probe.py" "$stage" "$((29650 + stage))" 2>"$work/log" || { tail -5 "$work/log"; exit 1; }; done
echo "seen: ZeRO-1 and ZeRO-2 leave it where it is, ZeRO-3 moves it as far as in the step before"
