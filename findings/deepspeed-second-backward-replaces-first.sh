#!/usr/bin/env bash
# DeepSpeed 0.19.8: of two `engine.backward` calls before one step, ZeRO stages 1 and 2 keep the second alone.
#
# Two losses, two forward and backward passes, one step: torch adds their gradients, and so does DeepSpeed at stages 0
# and 3. At stages 1 and 2 the first loss leaves no trace, without an error or a warning. Summing the losses and calling
# `backward` once is right at every stage.
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
FIRST, SECOND = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def movement(stage, together):
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=net, config=config)[0]
    if together:
        engine.backward(engine(FIRST).sum() + engine(SECOND).sum())
    else:
        engine.backward(engine(FIRST).sum())
        engine.backward(engine(SECOND).sum())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return [abs(value) for value in engine.module.weight[0].tolist()]


print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
for stage, expected in {0: [1, 1], 1: [0, 1], 2: [0, 1], 3: [1, 1]}.items():
    once, twice = movement(stage, together=True), movement(stage, together=False)
    print(f"stage {stage}: weights moved by {once} with one backward of the sum, by {twice} with two backwards")
    assert once == [1, 1], "the sum of two losses is no longer right"
    assert twice == expected, f"was {expected}"
print("seen: at stages 1 and 2 the first loss is lost")
PROBE
"$venv/bin/python" "$work/probe.py"
