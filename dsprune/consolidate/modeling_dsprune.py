# This file belongs to a compact model that dsprune made. It stands alone: it needs torch and transformers.
"""Compact transformers: the stock architectures, with sizes of their own in every layer.

`config.json` holds, under `dsprune`, the sizes of every layer and the family's layout. A model is
built as the stock class and its modules are then made smaller; a removed sublayer is bypassed and a
layer without sublayers is not there at all.
"""

import copy
from typing import Any

import transformers
from torch import nn

FORMAT = 1
FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
}
HEADS = {
    "Model": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


class Bypass(nn.Module):
    """Stands where a removed sublayer's module stood and returns one of its arguments, or zero.

    Args:
        rule: "first", "second" or "zero", with ", none" where the module also returns attention weights.
    """

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.what, _, self.more = rule.partition(", ")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        if self.what == "zero":
            result = arguments[0].new_zeros(())
        else:
            result = arguments[("first", "second").index(self.what)]
        return (result, None) if self.more else result

    def extra_repr(self) -> str:
        return self.rule


def _resized(module: Any, sizes: list[int | None]) -> nn.Module:
    """A new module of the same kind; `sizes` are those of the weight's axes, None where they stay."""
    # A model that is loaded straight into ZeRO-3 partitions keeps its shapes in `ds_shape`.
    dense = getattr(module.weight, "ds_shape", module.weight.shape)
    shape = [old if new is None else new for old, new in zip(dense, sizes, strict=True)]
    options = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        return nn.Linear(shape[1], shape[0], bias=module.bias is not None, **options)
    if isinstance(module, nn.Embedding):
        return nn.Embedding(shape[0], shape[1], padding_idx=module.padding_idx, **options)
    return nn.LayerNorm(shape, eps=module.eps, **options)


def _resize(root: nn.Module, path: str, axes: list[str], widths: dict[str, int]) -> None:
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    if hasattr(owner, name):
        sizes = [widths.get(axis) for axis in axes]
        if any(size is not None for size in sizes):
            setattr(owner, name, _resized(getattr(owner, name), sizes))


def _shrink_layer(layer: nn.Module, family: dict[str, Any], sizes: dict[str, int], facts: dict[str, Any]) -> None:
    """Give one layer its own sizes."""
    removed = facts["empty"] == "identity"
    widths = {"hidden": facts["hidden"], "head": sizes["heads"] * facts["head_dim"], "ffn_dim": sizes["ffn_dim"]}
    for path, axes in family["layer"].items():
        _resize(layer, path, axes, widths)
    for kind, count in (("attention", sizes["heads"]), ("ffn", sizes["ffn_dim"])):
        spec = family[kind]
        if count == 0 and removed:
            for path, rule in spec["skip"].items():
                parent, _, name = path.rpartition(".")
                setattr(layer.get_submodule(parent), name, Bypass(rule))
            continue
        known = {"heads": sizes["heads"], "head_dim": facts["head_dim"]}
        for path, attributes in spec.get("cached", {}).items():
            for name, formula in attributes.items():
                value = 1
                for factor in formula.split(" * "):
                    value *= known[factor]
                setattr(layer.get_submodule(path), name, value)


def shrink(model: Any, facts: dict[str, Any]) -> None:
    """Make a stock model, built on the dense sizes, as small as `facts` (the `dsprune` table) say."""
    family = facts["family"]
    base = getattr(model, family["base"], model)
    projection = family.get("embedding_projection")
    projected = projection is not None and hasattr(base, projection)
    widths = {"hidden": facts["hidden"]}
    if not projected:
        widths["embedding"] = facts["hidden"]
    for path, axes in family["embeddings"].items():
        _resize(base, path, axes, widths)
    for path, axes in family.get("pooler", {}).items():
        if getattr(base, path.split(".")[0], None) is not None:
            _resize(base, path, axes, widths)
    for layer, sizes in zip(base.get_submodule(family["layers"]), facts["layers"], strict=True):
        _shrink_layer(layer, family, sizes, facts)
    for kind, table in family["heads"].items():
        if base is not model and type(model).__name__.endswith(kind):
            for path, axes in table.items():
                _resize(model, path, axes, widths)


def dense_view(config: Any) -> Any:
    """The configuration with the dense model's sizes, which the stock constructors check, and the layers left."""
    facts = config.dsprune
    view = copy.deepcopy(config)
    sizes = {**facts["dense"], "num_layers": len(facts["layers"])}
    for ours, theirs in facts["family"]["sizes"].items():
        setattr(view, theirs, sizes[ours])
    return view


class CompactMixin:
    """Builds the stock model, then shrinks it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        facts = getattr(config, "dsprune", None)
        if not facts or facts.get("format") != FORMAT:
            raise ValueError(f"{type(self).__name__} needs a config.json with a `dsprune` table of format {FORMAT}")
        view = dense_view(config)
        super().__init__(view, *args, **kwargs)
        shrink(self, facts)
        # The stock constructor chose the attention implementation, on the view.
        config._attn_implementation = view._attn_implementation
        for module in self.modules():
            if getattr(module, "config", None) is view:
                module.config = config


def _make_config(model_type: str, stem: str) -> Any:
    stock = getattr(transformers, f"{stem}Config")
    name = f"Compact{stem}Config"
    return type(name, (stock,), {"model_type": f"dsprune_{model_type}", "_auto_class": "AutoConfig"})


def _make_model(stem: str, head: str, auto_class: str, config_class: Any) -> Any:
    stock = getattr(transformers, f"{stem}{head}")
    return type(
        f"Compact{stem}{head}",
        (CompactMixin, stock),
        {"config_class": config_class, "_auto_class": auto_class, "__doc__": f"Compact {stock.__name__}."},
    )


CONFIGS: dict[str, Any] = {}
MODELS: dict[tuple[str, str], Any] = {}
for _model_type, _stem in FAMILIES.items():
    CONFIGS[_model_type] = _make_config(_model_type, _stem)
    globals()[CONFIGS[_model_type].__name__] = CONFIGS[_model_type]
    for _head, _auto_class in HEADS.items():
        MODELS[_model_type, _head] = _make_model(_stem, _head, _auto_class, CONFIGS[_model_type])
        globals()[MODELS[_model_type, _head].__name__] = MODELS[_model_type, _head]


def register() -> None:
    """Let the Auto classes of transformers load compact folders without `trust_remote_code`."""
    for model_type, config_class in CONFIGS.items():
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for head, auto_class in HEADS.items():
            getattr(transformers, auto_class).register(config_class, MODELS[model_type, head], exist_ok=True)
