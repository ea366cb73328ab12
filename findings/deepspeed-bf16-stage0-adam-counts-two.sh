#!/usr/bin/env bash
# DeepSpeed 0.19.8: bf16 without ZeRO (stage 0) starts Adam's bias correction one step late.
#
# To allocate the optimizer's state, `deepspeed.initialize` takes one step on zero gradients. Adam then counts 2 at the
# first real step: its two moments hold one gradient and are corrected for two, so the first step is .74 of the step
# that ZeRO stage 1 takes from the same weights and the same gradient. The loss curves differ for many steps.
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


def first_step(stage):
    net = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.0, "torch_adam": True}},
    }
    engine = deepspeed.initialize(model=net, config=config)[0]
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
    engine.step()
    states = engine.optimizer.optimizer.state.values()
    return int(next(iter(states))["step"]), engine.module.weight[0, 0].item()


print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
seen = {stage: first_step(stage) for stage in (0, 1)}
for stage, (count, weight) in seen.items():
    print(f"stage {stage}: after the first step Adam counts {count}, the weight went from 0 to {weight:.4f}")
assert [count for count, _ in seen.values()] == [2, 1], "the steps are counted otherwise now"
assert abs(seen[0][1] / seen[1][1] - 0.744) < 0.02, "the first step at stage 0 has another size now"
print("seen: the first step at stage 0 is smaller, Adam counts it as the second")
PROBE
"$venv/bin/python" "$work/probe.py"
