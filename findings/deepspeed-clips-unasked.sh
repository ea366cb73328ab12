#!/usr/bin/env bash
# DeepSpeed 0.19.8: gradients are clipped to norm 1 where the configuration says nothing of clipping.
#
# `gradient_clipping` is 1.0 by default, at every ZeRO stage and in fp32 too; torch, and most training code, clip only
# when asked. The gradient below is (2, 2, 2, 2) and 2 for the bias: plain SGD with lr 1 moves by .447 instead of 2.
# `"gradient_clipping": 0.0` takes the whole step.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$venv/torch_extensions" PATH="$venv/bin:$PATH"

cat >"$work/probe.py" <<'PROBE'
import os

import deepspeed
import torch

torch.distributed.init_process_group("gloo", init_method=f"file://{__file__}.meeting", rank=0, world_size=1)
os.environ["LOCAL_RANK"] = "0"


def step(stage, **extra):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    before = net.weight.detach().clone()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **extra,
    }
    engine = deepspeed.initialize(model=net, config=config)[0]
    engine.backward(2 * engine(torch.ones(1, 4)).sum())
    engine.step()
    return (before - engine.module.weight.detach())[0, 0].item()


print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
for stage in (0, 1, 2):
    silent, off = step(stage), step(stage, gradient_clipping=0.0)
    print(f"stage {stage}: moved by {silent:.4f} without the key, by {off:.4f} with gradient_clipping 0")
    assert abs(silent - 2 / 20**0.5) < 1e-3, "gradients are no longer clipped to 1 unasked"
    assert abs(off - 2) < 1e-4, "gradient_clipping 0 no longer means no clipping"
print("seen: clipped to norm 1 unasked")
PROBE
"$venv/bin/python" "$work/probe.py"
