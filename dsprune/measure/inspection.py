"""What can be pruned in a model, and what was kept in a compact one, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsprune.consolidate import auto_with_own_head, check_stored_shapes, with_own_head
from dsprune.errors import ConfigError
from dsprune.files import read_json
from dsprune.measure.tables import render_table
from dsprune.run_folder import RunFolder
from dsprune.structure import CostModel, Structure, analyze, gate_shapes

__all__ = ["describe_compact", "describe_spaces", "inspect_config", "inspect_dense"]


def describe_spaces(structure: Structure) -> str:
    """The gates of a dense model: kind, shape, what one gate removes and what that saves alone."""
    sizes = structure.sizes
    cost = CostModel(structure)
    shapes = gate_shapes(sizes)
    removes = {
        "head": "an attention head" if sizes.heads_per_group == 1 else "a group of attention heads",
        "attn": "an attention sublayer and its norm",
        "ffn": "an FFN sublayer and its norm",
        "ffn_dim": "an FFN neuron",
        "hidden": "a coordinate of the residual stream",
        "qk_dim": "a query dimension and its key" if sizes.pair == 1 else "a rotary pair of queries and keys",
        "vo_dim": "a value dimension and its output",
        "attn_row": "a coordinate that attention writes",
        "ffn_row": "a coordinate that the FFN writes",
        "pooler": "a row of the pooler and what reads it",
    }
    encoder = cost.dense("encoder")
    rows = []
    for kind, shape in shapes.items():
        saved = _saved_by_one(structure, cost, kind)
        rows.append([kind, "x".join(map(str, shape)), removes[kind], f"{saved:,}", f"{saved / encoder:.3%}"])
    total = cost.dense("total")
    lines = [
        render_table(["gate", "shape", "one gate removes", "parameters", "of the encoder"], rows),
        f"{structure.family.name}: {_layers(structure)}, {sizes.num_heads} heads of {sizes.head_dim}"
        f"{f' in {sizes.num_groups} groups' if sizes.heads_per_group > 1 else ''}, FFN "
        f"{sizes.ffn_dim}, hidden {sizes.hidden}",
        f"parameters: encoder {encoder:,}, total {total:,}; the rest ({total - encoder:,}) is embeddings and task head",
    ]
    return "\n".join(lines)


def _layers(structure: Structure) -> str:
    """How many layers there are, stack by stack."""
    counts = [f"{len(stack.layers)} {stack.spec.name} layers".replace("  ", " ") for stack in structure.stacks]
    return " and ".join(counts)


def _saved_by_one(structure: Structure, cost: CostModel, kind: str) -> int:
    """Parameters that go with one unit of a kind, all else kept; hidden units also take from outside the encoder."""
    import torch

    gate = torch.ones(gate_shapes(structure.sizes)[kind])
    gate.view(-1)[0] = 0
    return cost.dense("encoder") - int(cost.parameters({kind: gate}, of="encoder"))


def describe_compact(config: Mapping[str, Any]) -> str:
    """What was kept, layer by layer, from the `dsprune` table of a compact model's config.json."""
    facts = config["dsprune"]
    dense = facts["dense"]
    by_source = {layer["source"]: layer for layer in facts["layers"]}
    rows = []
    for i in range(dense["num_layers"]):
        layer = by_source.get(i, {"heads": 0, "ffn_dim": 0})
        name = " ".join(filter(None, (layer.get("stack"), str(i))))
        rows.append([name, *_attention_cells(layer, facts), f"{layer['ffn_dim']} / {dense['ffn_dim']}"])
        for other, sizes in layer.items():
            if isinstance(sizes, dict) and "heads" in sizes:
                rows.append([f"{name} {other}", *_attention_cells(sizes, facts), ""])
    counted = facts["parameters"]
    lines = [
        render_table(["layer", "heads", "query sizes", "value sizes", "FFN size"], rows),
        f"hidden: {facts['hidden']} / {dense['hidden']}",
        *(
            f"{part} parameters: {counted[part]:,} of {counted[f'dense_{part}']:,} "
            f"({1 - counted[part] / counted[f'dense_{part}']:.2%} of the {part} removed)"
            for part in ("encoder", "total")
        ),
    ]
    return "\n".join(lines)


def _attention_cells(sizes: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Heads that are left, and the sizes of their queries and values."""
    dense = facts["dense"]
    dims = [_head_sizes(sizes, name, facts["head_dim"]) for name in ("qk_dims", "vo_dims")]
    return [f"{sizes['heads']} / {dense.get('num_groups', dense['num_heads'])}", *dims]


def _head_sizes(layer: Mapping[str, Any], name: str, head_dim: int) -> str:
    """Dimensions of each kept head, or one number where all are alike."""
    counts = layer.get(name, [head_dim] * layer["heads"])
    return str(counts[0]) if len(set(counts)) == 1 else " ".join(map(str, counts)) or "-"


def inspect_config(folder: Path) -> Mapping[str, Any]:
    """config.json of a model folder, or of the last model of a run folder.

    Raises:
        ConfigError: neither is there.
    """
    for candidate in (folder, RunFolder(folder).newest_model()):
        if candidate is None or not (candidate / "config.json").is_file():
            continue
        config: dict[str, Any] = read_json(candidate / "config.json")
        if "architectures" in config or "model_type" in config:
            return config
    raise ConfigError(f"{folder} is neither a model folder (config.json) nor a run that has a model yet")


def inspect_dense(source: str) -> Structure:
    """The structure of a dense model, by folder or hub id, from its configuration alone.

    Raises:
        ConfigError: no such model.
        ArchitectureError: no family covers it, or the weights in the folder have other shapes.
    """
    import torch
    import transformers

    from dsprune.pretrained import read_model_config

    config = read_model_config(source)
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, transformers.AutoModel)
    with torch.device("meta"):
        direct = hasattr(cls, "_from_config")
        build, own_head = (cls._from_config, with_own_head) if direct else (cls.from_config, auto_with_own_head)
        model = own_head(cls, config, lambda: build(config))
    structure = analyze(model)
    check_stored_shapes("model", source, structure)
    return structure
