"""A tiny compact model with block-sparse linears, in memory and as a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dsprune.arch import family_for
from dsprune.consolidate import modeling_dsprune
from dsprune.consolidate.compact import MODELING
from dsprune.consolidate.modeling_dsprune import BlockLinear
from dsprune.structure.blocks.grid import to_blocks
from tests.helpers.models import SIZES

STORED = {
    "attention.self.query": ((16, 16), 3),
    "attention.self.key": ((16, 16), 0),
    "attention.self.value": ((16, 16), 0),
    "attention.output.dense": ((16, 32), 1),
    "intermediate.dense": ((16, 16), 4),
    "output.dense": ((32, 24), 3),
}


def block_model(calibration: list[dict[str, Any]] | None = None, folder: Path | None = None) -> Any:
    """A tiny BERT whose first layer is block-sparse, made of random values; also saved where a folder is given."""
    layer = {"source": 0, "heads": 4, "ffn_dim": 64}
    blocks = {path: {"block": list(block), "kept": kept} for path, (block, kept) in STORED.items()}
    facts = {
        "format": modeling_dsprune.FORMAT,
        "method": None,
        "family": family_for("bert").as_dict(),
        "dense": {"num_layers": 2, "num_heads": 4, "hidden": 32, "ffn_dim": 64},
        "empty": "identity",
        "hidden": 32,
        "head_dim": 8,
        "head_multiple": 8,
        "embedding_rank": None,
        "layers": [layer | {"blocks": blocks}, layer | {"source": 1}],
        "calibration": calibration or [],
    }
    config = modeling_dsprune.CONFIGS["bert"](**SIZES, dsprune=facts)
    model = modeling_dsprune.MODELS["bert", "ForSequenceClassification"](config).eval()
    generator = torch.Generator().manual_seed(3)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=generator) * 0.2
    for module in model.modules():
        if isinstance(module, BlockLinear) and module.kept:
            _scatter(module, generator)
    if folder is not None:
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        stem = MODELING.stem
        config["auto_map"] = {
            "AutoConfig": f"{stem}.CompactBertConfig",
            "AutoModelForSequenceClassification": f"{stem}.CompactBertForSequenceClassification",
        }
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy2(MODELING, folder / MODELING.name)
    return model


def _scatter(module: BlockLinear, generator: torch.Generator) -> None:
    """Give a module another pattern than a new one has."""
    count = module.grid[0] * module.grid[1]
    mask = torch.zeros(count)
    mask[torch.randperm(count, generator=generator)[: module.kept]] = 1
    weight = torch.randn(module.out_features, module.in_features, generator=generator) * 0.2
    values, row_pointers, columns = to_blocks(weight, mask.view(module.grid), module.block)
    state = {"values": values, "row_pointers": row_pointers, "columns": columns}
    module.load_state_dict(state, strict=False)
