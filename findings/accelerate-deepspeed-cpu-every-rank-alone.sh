#!/usr/bin/env bash
# accelerate 1.15.0 with DeepSpeed 0.19.8 on a machine without a GPU: two processes, and each says it is the only one.
#
# `Accelerator` with a `DeepSpeedPlugin` under torchrun: torch.distributed has 2 ranks, `num_processes` is 1 on both, and
# the prepared loader hands the whole data set to each of them. Nothing fails, the ranks do the same work twice. With
# `cpu=True` it counts 2 and shards the data, but then trains with DDP: the DeepSpeed plugin is dropped unsaid.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0 deepspeed==0.19.8 accelerate==1.15.0 numpy==2.4.6
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$venv/torch_extensions" PATH="$venv/bin:$PATH"

cat >"$work/probe.py" <<'PROBE'
import sys

import torch
from accelerate import Accelerator, __version__
from accelerate.utils import DeepSpeedPlugin
from torch.utils.data import DataLoader

cpu = sys.argv[1:] == ["cpu"]
config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), cpu=cpu)
net = torch.nn.Linear(1, 1)
loader = DataLoader(torch.arange(8.0).unsqueeze(1), batch_size=2)
net, _, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader)
rows = [int(value) for batch in loader for value in batch.flatten()]

rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
count, wrapper = accelerator.num_processes, type(net).__name__
line = f"accelerate {__version__}, cpu={cpu}: rank {rank} of {world}, num_processes {count}, {wrapper}, rows {rows}"
print(line, flush=True)
assert world == 2, "two ranks were started"
if cpu:
    assert (count, wrapper, len(rows)) == (2, "DistributedDataParallel", 4), "the plugin is not dropped any more"
else:
    assert (count, wrapper, len(rows)) == (1, "DeepSpeedEngine", 8), "the ranks know of each other now"
torch.distributed.destroy_process_group()
PROBE
"$venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$work/probe.py"
"$venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$work/probe.py" cpu
echo "seen: with DeepSpeed each rank takes itself for the only one; with cpu=True there is no DeepSpeed"
