"""The compact model's configuration, and the compact model itself from one in memory or on disk."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from dsprune.arch import family_for
from dsprune.consolidate import modeling_dsprune
from dsprune.consolidate.tied_heads import with_own_head
from dsprune.errors import ArchitectureError, CheckpointError
from dsprune.structure import (
    BlockSelection,
    BlockStructure,
    CostModel,
    ParamSpec,
    Selection,
    Structure,
    analyze,
    analyze_blocks,
    compact_shape,
    cut,
    is_removed,
    stock_heads_fit,
    to_blocks,
)

__all__ = [
    "apply_blocks",
    "apply_selection",
    "compact_config",
    "compact_name",
    "is_stock",
    "kept_heads",
    "load_compact",
    "model_class",
    "surviving",
    "without_weights",
]

logger = logging.getLogger(__name__)
MODELING = Path(modeling_dsprune.__file__)
HEAD_MULTIPLE = 8
"""Head sizes that fused attention kernels take without padding of their own."""
EMBEDDING_RANK = "dsprune_embedding_rank"
"""Key of a dense model's configuration whose word embedding was factored before pruning."""
BLOCK_PARTS = ("values", "row_pointers", "columns")
"""What the weight of a block-sparse linear is stored as; the last two are int32."""
NOT_KEPT = ("transformers_version", "_name_or_path", EMBEDDING_RANK)


def surviving(structure: Structure, selection: Selection) -> Iterator[tuple[str, ParamSpec]]:
    """Parameters of the compact model: its name there, and its place in the dense one."""
    place: dict[int, int] = {}
    for source in kept_layers(structure, selection):
        start = structure.stack_of(source).start
        place[source] = sum(start <= other for other in place)
    for param in structure.params.values():
        if not is_removed(param, selection):
            yield compact_name(structure, param, place, selection), param


def kept_layers(structure: Structure, selection: Selection) -> list[int]:
    """Dense layers of which a parameter is left, and one without any where the encoder cannot be without a layer."""
    left = {p.sublayer.layer for p in structure.params.values() if p.sublayer and not is_removed(p, selection)}
    return sorted(left) or ([0] if structure.family.needs_layer else [])


def compact_name(structure: Structure, param: ParamSpec, place: dict[int, int], selection: Selection) -> str:
    """Name of a parameter once layers without sublayers are gone and the others have moved up.

    Args:
        structure: of the dense model.
        param: that is left.
        place: of each layer that is left, in its stack.
        selection: what is left.
    """
    if param.sublayer is None and not param.users:
        return param.name
    old = param.sublayer or param.users[0]
    new = param.sublayer or next(user for user in param.users if selection.has_units(user.kind, user.index))
    dense = structure.layer_paths[old.layer]
    return f"{dense.rpartition('.')[0]}.{place[new.layer]}{param.name.removeprefix(dense)}"


def _facts(structure: Structure, selection: Selection, method: str | None, head_multiple: int) -> dict[str, Any]:
    """The `dsprune` table of config.json; `layers` has the shape of transformers' own `per_layer_config`."""
    sizes = structure.sizes
    cost = CostModel(structure, empty=selection.empty)
    by_layer = selection.layer_sizes(structure)
    layers: list[dict[str, Any]] = []
    for i in kept_layers(structure, selection):
        stack = structure.stack_of(i).spec.name
        layers.append({"source": i, **({"stack": stack} if stack else {}), **by_layer[i]})
    hard = selection.hard()
    return {
        "format": modeling_dsprune.FORMAT,
        "method": method,
        "family": structure.family.as_dict(),
        "dense": {
            "num_layers": sizes.num_layers,
            "num_heads": sizes.num_heads,
            "num_groups": sizes.num_groups,
            "head_dim": sizes.head_dim,
            "hidden": sizes.hidden,
            "ffn_dim": sizes.ffn_dim,
            "embedding": sizes.embedding or sizes.hidden,
            "pooler": sizes.pooler or sizes.hidden,
        },
        "empty": selection.empty,
        "hidden": len(selection.kept(structure.hidden)),
        **({} if structure.pooler is None else {"pooler": len(selection.kept(structure.pooler))}),
        "head_dim": sizes.head_dim,
        "head_multiple": head_multiple,
        "embedding_rank": structure.embedding_rank,
        "layers": layers,
        "parameters": {
            "encoder": int(cost.parameters(hard, of="encoder")),
            "total": int(cost.parameters(hard, of="total")),
            "dense_encoder": cost.dense("encoder"),
            "dense_total": cost.dense("total"),
        },
    }


def compact_config(
    dense: dict[str, Any],
    structure: Structure,
    selection: Selection,
    *,
    method: str | None = None,
    head_multiple: int = HEAD_MULTIPLE,
) -> dict[str, Any]:
    """config.json of the compact model.

    Args:
        dense: config.json of the dense model.
        structure: of the dense model.
        selection: what is kept.
        method: name of the method, for the record.
        head_multiple: heads of unequal size are padded, when they run, to a multiple of this.

    Returns:
        A stock configuration where all that is left fits the stock class, else one that names the
        compact classes. Either way `dsprune` tells sizes and parameter counts.
    """
    facts, family = _facts(structure, selection, method, head_multiple), structure.family
    layers = facts["layers"]
    config = {key: value for key, value in dense.items() if key not in NOT_KEPT}
    groups = max((layer["heads"] for layer in layers), default=0)
    counts = {stack.count: sum(layer.get("stack", "") == stack.name for layer in layers) for stack in family.stacks}
    sizes = {
        **counts,
        "num_heads": groups * structure.sizes.heads_per_group,
        "num_groups": groups,
        "head_dim": structure.sizes.head_dim,
        "ffn_dim": max((layer["ffn_dim"] for layer in layers), default=0),
        "hidden": facts["hidden"],
        "embedding": structure.sizes.embedding if structure.is_projected else facts["hidden"],
        "pooler": facts.get("pooler", facts["hidden"]),
    }
    config |= {theirs: sizes[ours] for ours, theirs in family.sizes.items()}
    config["dsprune"] = facts
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer["source"]] for layer in layers]
    if _fits_stock(config, structure, selection):
        return config
    return config | _compact_identity(dense)


def block_config(compact: dict[str, Any], structure: BlockStructure, selection: BlockSelection) -> dict[str, Any]:
    """config.json of a compact model once blocks are removed from its matrices.

    Args:
        compact: config.json of the compact model.
        structure: its matrices.
        selection: the blocks that are kept; a matrix that keeps all stays dense.
    """
    config = copy.deepcopy(compact)
    facts = config["dsprune"]
    for matrix in structure.matrices:
        mask = selection.masks[matrix.path]
        if not mask.all():
            sparse = facts["layers"][matrix.layer].setdefault("blocks", {})
            sparse[matrix.place] = {"block": list(selection.block), "kept": int(mask.sum())}
    counted = facts["parameters"]
    encoder = int(structure.remaining(selection.masks))
    counted |= {"encoder": encoder, "total": counted["total"] - counted["encoder"] + encoder}
    counted["encoder_nonzeros"] = structure.nonzeros(selection.masks)
    return config if "auto_map" in config else config | _compact_identity(config)


def _compact_identity(dense: dict[str, Any]) -> dict[str, Any]:
    model_type = dense["model_type"]
    stem, heads = modeling_dsprune.FAMILIES[model_type]
    stock = (dense.get("architectures") or [f"{stem}Model"])[0]
    head = stock.removeprefix(stem)
    if (model_type, head) not in modeling_dsprune.MODELS:
        raise ArchitectureError(f"{stock} cannot be exported: supported heads are {', '.join(heads)}")
    module = MODELING.stem
    auto_map = {"AutoConfig": f"{module}.Compact{stem}Config", "AutoModel": f"{module}.Compact{stem}Model"}
    auto_map[modeling_dsprune.HEADS[head]] = f"{module}.Compact{stock}"
    return {"model_type": f"dsprune_{model_type}", "architectures": [f"Compact{stock}"], "auto_map": auto_map}


def _fits_stock(config: dict[str, Any], structure: Structure, selection: Selection) -> bool:
    """Whether the stock class built from this configuration is the compact model, parameter by parameter."""
    names = structure.family.sizes
    heads, hidden = config[names["num_heads"]], config[names["hidden"]]
    if not stock_heads_fit(structure, heads, hidden) or not config["architectures"]:
        return False
    if hidden != structure.sizes.hidden and structure.scales_head:
        return False
    depths = [config[names[stack.count]] for stack in structure.family.stacks]
    if depths[-1] > depths[0]:  # transformers makes the cache of a decoder as deep as the encoder
        return False
    ours = {name: compact_shape(param, selection) for name, param in surviving(structure, selection)}
    theirs = without_weights(config)
    return ours == {name: tuple(param.shape) for name, param in theirs.named_parameters()}


def is_stock(model: PreTrainedModel, selection: Selection) -> bool:
    """Whether a dense model's selection would be exported as the stock class; the model may have no weights."""
    dense = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return "auto_map" not in compact_config(dense, analyze(model), selection)


def kept_heads(facts: dict[str, Any]) -> list[list[int]]:
    """For each layer of a compact model, which dense query heads its query heads were; from its `dsprune` table."""
    dense = facts["dense"]
    shared = dense["num_heads"] // dense.get("num_groups", dense["num_heads"])
    return [
        [group * shared + i for group in layer.get("kept_heads", range(layer["heads"])) for i in range(shared)]
        for layer in facts["layers"]
    ]


def model_class(config: dict[str, Any]) -> type[nn.Module]:
    """The class that config.json names, stock or compact.

    Raises:
        CheckpointError: it names none that is known.
    """
    name = (config.get("architectures") or [""])[0]
    cls = getattr(modeling_dsprune, name, None) or getattr(transformers, name, None)
    if cls is None or not name:
        raise CheckpointError(f"config.json names the architecture '{name}', which is unknown here")
    return cls  # type: ignore[no-any-return]


def without_weights(config: dict[str, Any]) -> nn.Module:
    """The model that config.json describes, parameters on the meta device, buffers real; in eval mode."""
    from accelerate import init_empty_weights

    cls = model_class(config)
    built = cls.config_class.from_dict(dict(config))  # type: ignore[attr-defined]
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = with_own_head(cls, built, lambda: cls(built)).eval()
        if EMBEDDING_RANK in config:
            modeling_dsprune.factor_embedding(model, family_for(built.model_type).as_dict(), config[EMBEDDING_RANK])
    # Parameters on the meta device are new ones, which nothing has tied.
    model.tie_weights()  # type: ignore[operator]
    return model


def fill(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Give a model without weights its parameters, each once: what is tied to one of them follows."""
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, param in model.named_parameters() if param.is_meta]
    assert not empty, f"no values for {empty} of {missing}"
    assert not unexpected, f"no place for {unexpected}"


def apply_selection(model: PreTrainedModel, selection: Selection, *, head_multiple: int = HEAD_MULTIPLE) -> nn.Module:
    """The compact model of a dense one in memory: scales folded, removed units cut away.

    Args:
        model: a dense `transformers` model of a known family, with its weights.
        selection: what is kept.
        head_multiple: as in `compact_config`.

    Returns:
        A new model in eval mode, of the same dtype; equal to the masked model up to rounding.

    Raises:
        ArchitectureError: unknown family or head.
    """
    structure = analyze(model)
    dense = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    compact = without_weights(compact_config(dense, structure, selection, head_multiple=head_multiple))
    state = {
        name: cut(param, model.get_parameter(param.name).detach(), selection)
        for name, param in surviving(structure, selection)
    }
    fill(compact, state)
    return compact


def apply_blocks(model: PreTrainedModel, selection: BlockSelection) -> nn.Module:
    """A compact model in memory without the blocks that are not kept.

    Args:
        model: a compact model with its weights.
        selection: the blocks that are kept.

    Returns:
        A new model in eval mode, of the same dtype, with block-sparse linears.

    Raises:
        ArchitectureError: not a compact model, or one whose heads are packed.
    """
    structure = analyze_blocks(model, selection.block)
    dense = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    compact = without_weights(block_config(dense, structure, selection))
    state = {}
    for name, param in model.named_parameters():
        path = name.removesuffix(".weight")
        mask = selection.masks.get(path) if name != path else None
        if mask is None or mask.all():
            state[name] = param.detach()
            continue
        parts = to_blocks(param.detach(), mask, selection.block)
        state |= {f"{path}.{part}": value for part, value in zip(BLOCK_PARTS, parts, strict=True)}
    fill(compact, state)
    return compact


def load_compact(folder: str | Path, **options: Any) -> nn.Module:
    """Load a model folder that dsprune wrote, as the class that it names.

    Args:
        folder: the folder.
        options: for `from_pretrained` (dtype, device_map, ...).

    Raises:
        CheckpointError: not such a folder, or one with weights that are missing or of another shape.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a model folder: {path} cannot be read") from error
    if "dsprune" not in config:
        raise CheckpointError(f"{folder} was not made by dsprune: load it with transformers")
    cls: Any = model_class(config)
    built = cls.config_class.from_dict(dict(config))
    found: dict[str, Any] = {}

    def make() -> nn.Module:
        model, info = cls.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        found.update(info)
        return model  # type: ignore[no-any-return]

    model = with_own_head(cls, built, make)
    _refuse_gaps(folder, found)
    return model


def _refuse_gaps(folder: str | Path, found: Mapping[str, Any]) -> None:
    """No weight of a model that was pruned may be random."""
    if missing := found["missing_keys"]:
        raise CheckpointError(
            f"{folder} is not complete: {len(missing)} weights are not there, the first is {min(missing)}"
        )
    if unlike := found["mismatched_keys"]:
        name, theirs, ours = min(unlike)
        raise CheckpointError(f"{folder}: {name} is {list(theirs)} in its files and {list(ours)} by its config.json")
    if left := found["unexpected_keys"]:
        logger.warning("%s: %d tensors have no place in the model, the first is %s", folder, len(left), min(left))
