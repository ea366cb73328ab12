#!/usr/bin/env bash
# DeepSpeed 0.19.8: an optimizer of type "Adam" in the configuration decays weights as AdamW does.
#
# torch's Adam adds weight_decay to the gradient (L2), AdamW shrinks the weights apart from it. DeepSpeed's "Adam" is
# AdamW unless its params also say `adam_w_mode: false`: the first step below is torch's AdamW to 1e-6.
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
PARAMS = {"lr": 0.1, "weight_decay": 0.5}


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1)


def by_torch(kind):
    net = model()
    optimizer = kind(net.parameters(), **PARAMS)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return net.weight.detach()


def by_deepspeed(**params):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Adam", "params": {**PARAMS, **params}},
    }
    engine = deepspeed.initialize(model=model(), config=config)[0]
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    return engine.module.weight.detach()


adam, adamw = by_torch(torch.optim.Adam), by_torch(torch.optim.AdamW)
asked, coupled = by_deepspeed(), by_deepspeed(adam_w_mode=False)
print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
for name, weight in {"torch Adam": adam, "torch AdamW": adamw, 'DeepSpeed "Adam"': asked}.items():
    print(f"{name}: {[round(value, 4) for value in weight.flatten().tolist()]}")
print('DeepSpeed "Adam" with adam_w_mode false:', [round(value, 4) for value in coupled.flatten().tolist()])
assert torch.allclose(asked, adamw, atol=1e-6) and not torch.allclose(asked, adam, atol=1e-3), '"Adam" is Adam now'
assert torch.allclose(coupled, adam, atol=1e-6), "adam_w_mode false no longer gives Adam"
print('seen: "Adam" takes the step of AdamW')
PROBE
"$venv/bin/python" "$work/probe.py"
